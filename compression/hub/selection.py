"""Which files of a model that lies elsewhere are wanted: an allow-list, so that no pickle ever gets here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, TypeVar

from compression.boundary import parse_json
from compression.checkpoint.headers import INDEX_FILE, SINGLE_FILE
from compression.errors import SourceError

_SUFFIXES = (".json", ".jinja", ".md", ".model", ".py", ".tiktoken", ".txt")
_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")


class RemoteFile(Protocol):
    """A file that lies elsewhere. size: bytes."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...


File = TypeVar("File", bound=RemoteFile)


def wanted_files(model: str, files: Mapping[str, File], read_index: Callable[[], bytes]) -> list[File]:
    """Config, tokenizer, templates and licence at the top, and the weights that Transformers would load.

    Folders (weights in another format, mostly) are left out, and so are safetensors files that the index does
    not name. model: what errors call it. files: all that it has, by name. read_index: gives the index; called
    only if there is one and no single file.

    Raises SourceError: pickle_only, weights_missing, index_invalid.
    """
    top = [file for file in files.values() if "/" not in file.name]
    chosen = [file for file in top if file.name.endswith(_SUFFIXES) or file.name.startswith(_NAMES)]
    if SINGLE_FILE in files:
        return [*chosen, files[SINGLE_FILE]]
    if INDEX_FILE not in files:
        raise _no_weights(model, (file.name for file in top))
    names = _named_by(read_index())
    missing = sorted(names - files.keys())
    if missing:
        raise SourceError(
            "weights_missing",
            f"{len(missing)} of {len(names)} weight files are not in {model!r}: {missing[0]}, ...",
            "Use another revision or model.",
        )
    return [*chosen, *(files[name] for name in sorted(names))]


def _named_by(index: bytes) -> set[str]:
    try:
        names = set(parse_json(index)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        names = set()
    if not names or not all(_is_plain(name) for name in names):
        raise SourceError(
            "index_invalid", f"{INDEX_FILE} names no safetensors files.", "Use another revision."
        )
    return names


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and "/" not in name


def _no_weights(model: str, names: Iterable[str]) -> SourceError:
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    if pickles:
        return SourceError(
            "pickle_only",
            f"{model!r} has its weights as pickles only. Loading one can run code: none is opened.",
            "Use a revision or model with safetensors files.",
        )
    return SourceError(
        "weights_missing",
        f"{model!r} has neither {SINGLE_FILE} nor {INDEX_FILE}.",
        "Use a model in the layout of Transformers.",
    )
