"""What a local checkpoint holds, from config.json and safetensors headers alone.

No tensor is read, and nothing but the standard library is imported. The files come from strangers: every
length and range is checked before it is used, links may not lead out of the folder, pickles are never opened.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from compression.boundary import parse_json, reason
from compression.checkpoint.layout import DTYPE_BITS, TensorSpec
from compression.checkpoint.tensors import FileStamp, StoredTensor, TensorInfo
from compression.errors import SourceError, some

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit; also the limit for an index."""
MAX_CONFIG_BYTES = 10_000_000
MAX_JSON_BRACKETS = 1_000_000
MAX_JSON_COMMAS = 2_000_000
"""What 330,000 tensors in one file need. Small objects and numbers take much more memory than their text."""
MAX_RANK = 64
"""torch has no tensors of more dimensions."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_OTHER_WEIGHT_SUFFIXES = {".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz", ".tflite", ".ot"}
_WEIGHT_SUFFIXES = {".safetensors"} | _PICKLE_SUFFIXES | _OTHER_WEIGHT_SUFFIXES
_REWRITTEN = {"config.json", "README.md", "recipe.yaml", "bitmill.json"}
_ADAPTER_CONFIG = "adapter_config.json"
_OF_A_RUN = {"bitmill.json", ".bitmill"}
_OF_A_CHECKPOINT = {SINGLE_FILE, INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json"}
_TRAINERS_FOLDER = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class Checkpoint:
    """A model folder. `folder` and all files are resolved paths. `weight_names` are the names that the weight
    files have in the folder, `weight_bytes` the size of all; `other_files` are copied, and relative to it.
    `left_out`: what lies in the folder and is not copied although it is no weight: an adapter's config, and
    folders (with a slash at their end) that hold a checkpoint of their own."""

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    weight_files: tuple[Path, ...]
    weight_names: tuple[str, ...]
    weight_bytes: int
    other_files: tuple[str, ...]
    left_out: tuple[str, ...] = ()


def read_checkpoint(source: str | Path) -> Checkpoint:
    """Read and check everything about a model folder that takes no tensor data.

    Raises:
        SourceError: `model_not_found`, `config_missing`, `config_invalid`, `pickle_only`, `weights_missing`,
            `index_invalid`, `invalid_safetensors`, `unsafe_link`, `source_unreadable`. Messages name files
            relative to the folder, never the folder's place on this machine.
    """
    folder = Path(source)
    try:
        if not folder.is_dir():
            raise SourceError(
                "model_not_found",
                f"There is no model folder {folder.name!r}.",
                "Give the path of a folder that holds config.json and safetensors files.",
            )
        folder = folder.resolve(strict=True)
        config = _read_config(folder)
        names, weight_map = _weight_names(folder)
        weight_files = tuple(resolve_inside(folder, name) for name in names)
        tensors = _read_headers(weight_files)
        _check_index(weight_map, tensors)
        weight_bytes = sum(stamp.size for stamp in {info.stamp for info in tensors.values()})
        other_files, left_out = _other_files(folder)
        return Checkpoint(folder, config, tensors, weight_files, names, weight_bytes, other_files, left_out)
    except OSError as error:
        raise SourceError(
            "source_unreadable", f"The model folder cannot be read: {error.strerror or error}."
        ) from error


def resolve_inside(folder: Path, name: str) -> Path:
    """The real path of a file of the (resolved) folder. Links of the Hub's cache lead to its `blobs`.

    Raises:
        SourceError: `unsafe_link` when it leads out of the folder, or nowhere.
    """
    try:
        path = (folder / name).resolve(strict=True)
    except (OSError, RuntimeError):
        path = None
    if path is None or not (path.is_relative_to(folder) or _is_blob(folder, path)):
        raise SourceError(
            "unsafe_link",
            f"{name} is a link that leads {'nowhere' if path is None else 'out of the model folder'}.",
            "Replace links by the files themselves (cp -rL).",
        )
    return path


def _is_blob(folder: Path, path: Path) -> bool:
    """Whether `folder` is <cache>/<repository>/snapshots/<commit> and the file lies where its links lead: in
    <repository>/blobs, or in <cache>/blobs, which repositories share."""
    if folder.parent.name != "snapshots":
        return False
    repository = folder.parent.parent
    return path.parent == repository / "blobs" or path.is_relative_to(repository.parent / "blobs")


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """A descriptor, for reading, of a regular file; no link is followed and no pipe waited for.

    Raises:
        SourceError: `source_changed` when the file is gone or has become a link, else `source_unreadable`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            raise SourceError("source_changed", f"{path.name} is gone, or has become a link.") from error
        raise SourceError("source_unreadable", f"{path.name} cannot be read: {error.strerror}.") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise SourceError("source_unreadable", f"{path.name} is not a regular file.")
        yield descriptor
    finally:
        os.close(descriptor)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in the order of their data.

    Raises:
        SourceError: `invalid_safetensors` for whatever the safetensors library would refuse, and for
            tensors named twice.
    """
    with open_regular(path) as descriptor:
        stamp = FileStamp.of(descriptor)
        text = _header_text(path.name, descriptor, stamp.size)
    header = _parse_json(text, path.name, "invalid_safetensors")
    if not isinstance(header, dict):
        _invalid(path.name, "the header is not a JSON object")
    _check_metadata(path.name, header.pop("__metadata__", None))
    data_start = 8 + len(text)
    entries = sorted(
        (_entry(path.name, name, entry) for name, entry in header.items()), key=lambda e: (e[2], e[3])
    )
    position = 0
    tensors = {}
    for name, spec, begin, end in entries:
        if begin != position:
            _invalid(path.name, f"the data of {name} overlaps its neighbour's or leaves a gap")
        if (end - begin) * 8 != spec.bits:
            _invalid(
                path.name,
                f"{name} has {end - begin} bytes of data, its shape and dtype say {spec.bits / 8:g}",
            )
        position = end
        tensors[name] = TensorInfo(
            name, spec.dtype, spec.shape, path, data_start + begin, data_start + end, stamp
        )
    if data_start + position != stamp.size:
        _invalid(path.name, f"the header describes {data_start + position} bytes, the file has {stamp.size}")
    return tensors


def _header_text(name: str, descriptor: int, size: int) -> bytes:
    if size < 8:
        _invalid(name, f"it has {size} bytes, too few for a header")
    (length,) = struct.unpack("<Q", os.pread(descriptor, 8, 0))
    if length > MAX_HEADER_BYTES:
        _invalid(name, f"it claims a header of {length} bytes; the format allows {MAX_HEADER_BYTES}")
    if 8 + length > size:
        _invalid(name, f"it claims a header of {length} bytes, but has {size} bytes in all: truncated?")
    text = _pread_all(descriptor, length, 8)
    if len(text) != length or not text.startswith(b"{"):
        _invalid(name, "the header is not a JSON object")
    return text


def _pread_all(descriptor: int, length: int, offset: int) -> bytes:
    parts = []
    while length:
        part = os.pread(descriptor, min(length, 8 << 20), offset)
        if not part:
            break
        parts.append(part)
        length -= len(part)
        offset += len(part)
    return b"".join(parts)


def _entry(file: str, name: str, entry: Any) -> tuple[str, TensorSpec, int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _invalid(file, f"the entry of {name[:200]!r} needs dtype, shape and data_offsets, nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _invalid(file, f"{name[:200]!r} has an unknown dtype, {str(dtype)[:40]!r}")
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        _invalid(file, f"{name[:200]!r} has an impossible shape")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _invalid(file, f"{name[:200]!r} has impossible data_offsets")
    return name, TensorSpec(dtype, tuple(shape)), offsets[0], offsets[1]


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_metadata(file: str, metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _invalid(file, "__metadata__ must hold strings only")


def _invalid(file: str, reason: str) -> NoReturn:
    raise SourceError(
        "invalid_safetensors", f"{file} is not a valid safetensors file: {reason}.", "Download it again."
    )


def _parse_json(text: bytes, name: str, code: str) -> Any:
    """JSON from a stranger: UTF-8, no name twice in an object, bounded in objects and in depth."""
    brackets = text.count(b"[") + text.count(b"{")
    if brackets > MAX_JSON_BRACKETS or text.count(b",") > MAX_JSON_COMMAS:
        raise SourceError(code, f"{name} holds more than any model has.")
    try:
        return parse_json(text, unique_names=True, whole_characters=True)
    except ValueError as error:
        message = f"{name} is not valid JSON: {reason(error)}."
        raise SourceError(code, message, "Download it again.") from error


def _read_json(folder: Path, name: str, limit: int, code: str) -> dict[str, Any]:
    with open_regular(resolve_inside(folder, name)) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise SourceError(code, f"{name} has {size} bytes; at most {limit} are read.")
        value = _parse_json(_pread_all(descriptor, size, 0), name, code)
    if not isinstance(value, dict):
        raise SourceError(code, f"{name} is not a JSON object.", "Download it again.")
    return value


def _read_config(folder: Path) -> dict[str, Any]:
    if not os.path.lexists(folder / "config.json"):
        raise SourceError(
            "config_missing",
            f"{folder.name} has no config.json.",
            "Give a folder in the layout of Transformers' save_pretrained.",
        )
    return _read_json(folder, "config.json", MAX_CONFIG_BYTES, "config_invalid")


def _weight_names(folder: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """The safetensors files, sorted, and the index's map of tensor to file (empty for a single file)."""
    if os.path.lexists(folder / SINGLE_FILE):
        return (SINGLE_FILE,), {}
    if not os.path.lexists(folder / INDEX_FILE):
        _no_weights(folder)
    weight_map = _read_json(folder, INDEX_FILE, MAX_HEADER_BYTES, "index_invalid").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError("index_invalid", f"{INDEX_FILE} has no weight_map.", "Download it again.")
    names = set()
    for file in weight_map.values():
        if not isinstance(file, str) or not _is_plain(file):
            raise SourceError(
                "index_invalid",
                f"{INDEX_FILE} names {str(file)[:200]!r}; only plain names of .safetensors files beside it "
                "are allowed.",
            )
        names.add(file)
    missing = sorted(name for name in names if not os.path.lexists(folder / name))
    if missing:
        raise SourceError(
            "weights_missing",
            f"{len(missing)} of {len(names)} weight files are missing: {some(missing)}.",
            "Download them again.",
        )
    return tuple(sorted(names)), weight_map


def _is_plain(name: str) -> bool:
    return name.endswith(".safetensors") and not name.startswith(".") and not set(name) & set("/\\\0")


def _no_weights(folder: Path) -> NoReturn:
    suffixes = {path.suffix.lower() for path in folder.iterdir()}
    if suffixes & _PICKLE_SUFFIXES and ".safetensors" not in suffixes:
        raise SourceError(
            "pickle_only",
            f"{folder.name} has its weights as pickles only. Loading one can run code: none is ever opened.",
            "Convert them to safetensors on a machine where you trust them.",
        )
    raise SourceError(
        "weights_missing",
        f"{folder.name} has neither {SINGLE_FILE} nor {INDEX_FILE}.",
        "Save the model with Transformers' save_pretrained.",
    )


def _read_headers(files: tuple[Path, ...]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        for name, info in read_header(path).items():
            if name in tensors:
                raise SourceError(
                    "index_invalid", f"{name} is in two files, {tensors[name].file.name} and {path.name}."
                )
            tensors[name] = info
    return tensors


def _check_index(weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    absent = sorted(name for name in weight_map if name not in tensors)
    if absent:
        raise SourceError(
            "index_invalid",
            f"{INDEX_FILE} names {len(absent)} tensors that are not in the files: {some(absent)}.",
            "Download the model again.",
        )


def _other_files(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is copied byte for byte: all but weights, indexes, hidden folders, and what Bitmill writes; and
    `left_out`, as in Checkpoint."""

    def refuse(error: OSError) -> NoReturn:
        raise error

    found, left_out = [], []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        relative = Path(parent).relative_to(folder).as_posix()
        if relative != "." and _is_checkpoint(Path(parent).name, {*files, *folders}):
            left_out.append(f"{relative}/")
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*files, *folders):
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink():
                resolve_inside(folder, relative)
            if name == _ADAPTER_CONFIG:
                left_out.append(relative)
            elif path.is_file() and not _is_replaced(relative):
                found.append(relative)
    return tuple(sorted(found)), tuple(sorted(left_out))


def _is_checkpoint(name: str, content: set[str]) -> bool:
    """Whether a folder inside a model's is a model of its own: one that a trainer saved on its way, an output
    of Bitmill or of another tool, or what is left of an interrupted run."""
    if _TRAINERS_FOLDER.fullmatch(name) or content & _OF_A_RUN:
        return True
    return "config.json" in content and bool(content & _OF_A_CHECKPOINT)


def _is_replaced(relative: str) -> bool:
    name = relative.lower()
    weights = any(name.endswith(suffix) for suffix in _WEIGHT_SUFFIXES)
    return weights or name.endswith(".index.json") or relative in _REWRITTEN
