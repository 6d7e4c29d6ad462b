"""The one boundary with what is not ours: libraries, the file system, and text of strangers.

    with foreign("tokenizer_invalid", "The tokenizer cannot be read", hint):
        AutoTokenizer.from_pretrained(...)           any exception ─▶ SourceError: tokenizer_invalid
    with writing(path):
        file.write(...)                              OSError ─▶ ResourceError: disk_full, output_not_writable
    parse_json(line)                                 any JSON, any depth ─▶ a value or ValueError

    @last_resort                                     what nobody foresaw ─▶ UnexpectedError: engine_error
    def compress(...): ...

`foreign` stands around single calls of a library, never around code of ours: a fault of ours must stay
visible as one. Where a library calls code of ours, `calls_ours` lets through what that raises. `last_resort`
stands around what programs call.
"""

from __future__ import annotations

import errno
import functools
import inspect
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from compression.errors import CompressionError, ResourceError, SourceError, UnexpectedError

MAX_JSON_DEPTH = 100
"""Levels of lists and objects. Python's own limit depends on its version and on the caller's depth."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LONGEST_REASON = 300  # characters
_WITHOUT_WORDS = (LookupError, AttributeError, TypeError, ArithmeticError, AssertionError)
"""Errors whose message says little without their type: that of a KeyError is the key."""
_WITHOUT_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "Cannot allocate memory",  # ENOMEM in words, of a file that is mapped
    "CUDA error: out of memory",
    "_STATUS_ALLOC_FAILED",  # of cuBLAS, cuSOLVER and others
)
"""What torch says in a RuntimeError of no kind of its own; 2.11, c10/core/impl/alloc_cpu.cpp and others."""
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@contextmanager
def foreign(
    code: str,
    what: str,
    hint: str = "",
    *,
    kind: type[CompressionError] = SourceError,
    calls_ours: bool = False,
) -> Iterator[None]:
    """Raise whatever a library raises as `kind(code, "<what>: <reason>.", hint)`.

    Errors of ours pass. So does what no input is to blame for: a full disk, no memory, the process that is
    told to end. calls_ours: the library calls code of this package, and what fails in there passes too.
    """
    try:
        yield
    except CompressionError:
        raise
    except BaseException as error:
        if not _is_error(error) or is_out_of_memory(error) or is_disk_full(error):
            raise
        if calls_ours and _is_in_this_package(error):
            raise
        raise kind(code, f"{what}: {reason(error)}.", hint) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file could not be written, and why.

    Raises:
        ResourceError: `disk_full` for ENOSPC, EDQUOT and EFBIG, else `output_not_writable`.
    """
    try:
        yield
    except OSError as error:
        if is_out_of_memory(error):
            raise
        raise _not_written(path.name, error) from error


def _not_written(name: str, error: OSError) -> ResourceError:
    if is_disk_full(error):
        return ResourceError(
            "disk_full",
            f"There is no room to write {name}: {error.strerror}.",
            "Free disk space, or raise the quota or file size limit.",
        )
    return ResourceError(
        "output_not_writable",
        f"{name} cannot be written: {reason(error)}.",
        "Choose a folder in which this process may write.",
    )


def parse_json(text: bytes | str, *, unique_names: bool = False, whole_characters: bool = False) -> Any:
    """A JSON value. unique_names: no name twice in an object. whole_characters: no half of a surrogate pair,
    which JSON can hold and UTF-8 cannot.

    Raises:
        ValueError: it is no JSON, not UTF-8, or nested more than MAX_JSON_DEPTH levels deep.
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    decoded = raw.decode() if isinstance(text, bytes) else text
    try:
        value = json.loads(decoded, object_pairs_hook=_unique if unique_names else None)
    except RecursionError:
        raise _too_deep() from None
    if raw.count(b"[") + raw.count(b"{") > MAX_JSON_DEPTH and _is_deep(value):
        raise _too_deep()
    if whole_characters and _HALF_CHARACTER.search(raw):
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a name occurs twice")
    return mapping


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            item
            for container in level
            if isinstance(container, dict | list)
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def _too_deep() -> ValueError:
    return ValueError(f"nested too deeply, more than {MAX_JSON_DEPTH} levels")


def last_resort(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Let only CompressionErrors out of `function`, and what its caller's own `on_event` raises.

    Raises:
        ResourceError: `out_of_memory`, `disk_full`.
        UnexpectedError: `engine_error`, with the type and message of what nobody foresaw.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        of_caller: list[BaseException] = []
        bound = signature.bind(*args, **kwargs)
        if (on_event := bound.arguments.get("on_event")) is not None:
            bound.arguments["on_event"] = _remembering(on_event, of_caller)
        try:
            return function(*bound.args, **bound.kwargs)
        except CompressionError:
            raise
        except BaseException as error:
            if not _is_error(error) or any(error is one for one in of_caller):
                raise
            raise unexpected(error) from error

    return guarded


def _remembering(on_event: Callable[[Any], None], raised: list[BaseException]) -> Callable[[Any], None]:
    def call(event: Any) -> None:
        try:
            on_event(event)
        except BaseException as error:
            raised.append(error)
            raise

    return call


def unexpected(error: BaseException) -> CompressionError:
    """What stands for an error that nothing closer to its cause has named."""
    if is_out_of_memory(error):
        return ResourceError(
            "out_of_memory",
            f"The engine ran out of memory: {reason(error)}.",
            "Use a machine with more memory, or fewer or shorter calibration samples.",
        )
    if isinstance(error, OSError) and is_disk_full(error):
        return _not_written(Path(str(error.filename or "a file")).name, error)
    return UnexpectedError(
        "engine_error",
        f"{type(error).__name__}: {reason(error)} ({_place(error)})",
        "Bitmill did not foresee this: please report it, with the log.",
    )


def reason(error: BaseException) -> str:
    """Why, in one line for people, without a full stop."""
    if isinstance(error, RecursionError):
        text = "nested too deeply"
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror
    elif isinstance(error, _WITHOUT_WORDS):
        text = f"{type(error).__name__}: {error}"
    else:
        text = str(error)
    text = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    shown = "".join(character for character in text if character.isprintable())
    if len(shown) > _LONGEST_REASON:
        return f"{shown[:_LONGEST_REASON]} (shortened)"
    return shown.rstrip(". ") or type(error).__name__


def is_disk_full(error: BaseException) -> bool:
    """Whether there was no room to write."""
    return isinstance(error, OSError) and error.errno in _FULL


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this machine's memory, or the device's, was too small."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WITHOUT_MEMORY)


def _is_error(error: BaseException) -> bool:
    """Whether it says that something went wrong; a panic of a library in Rust is no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _is_in_this_package(error: BaseException) -> bool:
    """Whether the innermost frame runs code of this package."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "no traceback"
