"""What is finished and proven on disk.

A run works in `<output_dir>.partial`. Its journal is a file of JSON lines: first the resolved plan, then one
line for each layer whose shard is on disk. A later run with the same work key goes on from there; lines that
a crash tore, and shards whose digest is wrong, count as never written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compression.boundary import foreign, parse_json, reason, writing
from compression.checkpoint.writer import Shard, read_shard, sync_folder, write_file
from compression.errors import CompressionError, PlanError, Problem, ResourceError
from compression.events import JOURNAL_FILE, PARTIAL_SUFFIX
from compression.report import ModuleReport


@dataclass(frozen=True)
class FinishedLayer:
    """A layer's shard, and its modules' report rows."""

    layer: int
    file: str
    sha256: str
    size: int
    modules: tuple[ModuleReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """The journal line."""
        return {
            "type": "layer",
            "layer": self.layer,
            "file": self.file,
            "sha256": self.sha256,
            "size": self.size,
            "report": {"modules": [module.to_dict() for module in self.modules]},
        }

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> FinishedLayer:
        rows = tuple(ModuleReport.from_dict(row) for row in entry["report"]["modules"])
        return cls(entry["layer"], entry["file"], entry["sha256"], entry["size"], rows)


def check_output(output_dir: Path) -> None:
    """Whether a folder of this name can be made, as far as that shows without making anything.

    Raises:
        PlanError: `output_exists`, `output_not_writable`.
    """
    try:
        if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
            raise PlanError(
                Problem(
                    "output_exists",
                    f"{output_dir} exists and is not empty.",
                    "Choose another output_dir, or remove it.",
                    "/output_dir",
                )
            )
        why = _unwritable(output_dir)
    except (OSError, ValueError) as error:
        why = reason(error)
    if why:
        raise PlanError(
            Problem(
                "output_not_writable",
                f"{_shortened(output_dir)} cannot be made: {why}.",
                "Choose another output_dir: a new name in a folder in which this process may write.",
                "/output_dir",
            )
        )


def _unwritable(output_dir: Path) -> str:
    """Why a folder cannot be made beside which a run works, or nothing."""
    if output_dir.name in ("", "..") or "\0" in str(output_dir):
        return "it is no name for a new folder"
    if output_dir.is_symlink():
        return "it is a link, which a folder cannot replace"
    if output_dir.is_mount():
        return "it is a mount point, which a folder cannot replace"
    above = next(parent for parent in output_dir.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        return f"{above} is no folder"
    longest = os.pathconf(above, "PC_NAME_MAX") - len(PARTIAL_SUFFIX)
    if len(os.fsencode(output_dir.name)) > longest:
        return f"its name is longer than {longest} bytes (a run works in a folder named *{PARTIAL_SUFFIX})"
    for flag, what in ((os.W_OK, "written to"), (os.X_OK, "entered")):
        if not os.access(above, flag):
            return f"{above} cannot be {what}"
    return ""


def _shortened(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:200]}..."


@dataclass
class Journal:
    """The journal of one working folder.

    header: {"type": "plan", "work_key", "fingerprint", "resolved"}; empty until `begin`.
    """

    folder: Path
    header: dict[str, Any] = field(default_factory=dict)
    finished: dict[int, FinishedLayer] = field(default_factory=dict)
    shards: dict[int, Shard] = field(default_factory=dict)

    @classmethod
    def open(cls, output_dir: Path) -> Journal:
        """The journal beside `output_dir`, with what an earlier run left there.

        Raises:
            PlanError: of `check_output`.
            ResourceError: `disk_full`, `output_not_writable`.
        """
        check_output(output_dir)
        folder = output_dir.with_name(output_dir.name + PARTIAL_SUFFIX)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        journal = cls(folder)
        journal._read()
        return journal

    def begin(self, header: dict[str, Any]) -> None:
        """Start or go on under this header. Finished layers of another work key are removed, and those whose
        shard is not on disk with the right digest are forgotten."""
        if self.header.get("work_key") != header["work_key"]:
            with writing(self.folder):
                shutil.rmtree(self.folder)
                self.folder.mkdir()
            self.finished.clear()
        self.header = header
        for layer in list(self.finished.values()):
            shard = self._shard_of(layer)
            if shard is None:
                del self.finished[layer.layer]
            else:
                self.shards[layer.layer] = shard
        self._rewrite()

    def commit(self, layer: int, shard: Shard, modules: Sequence[ModuleReport]) -> FinishedLayer:
        """Append a layer whose shard is already synced; it is finished when this returns."""
        finished = FinishedLayer(layer, shard.file, shard.sha256, shard.size, tuple(modules))
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finished.to_dict()) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.finished[layer] = finished
        self.shards[layer] = shard
        return finished

    def _shard_of(self, layer: FinishedLayer) -> Shard | None:
        try:
            shard = read_shard(self.folder / layer.file)
        except (OSError, CompressionError):
            return None
        return shard if shard.sha256 == layer.sha256 else None

    def _read(self) -> None:
        path = self._path
        remove = f"Remove {self.folder.name}, and begin anew."
        with foreign("output_not_writable", "The journal cannot be read", remove, kind=ResourceError):
            lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        for line in lines:
            try:
                entry = parse_json(line)
                if entry["type"] == "plan":
                    self.header = entry
                else:
                    layer = FinishedLayer.from_dict(entry)
                    self.finished[layer.layer] = layer
            except (ValueError, KeyError, TypeError):
                break  # torn by a crash; what follows was never written

    def _rewrite(self) -> None:
        """The file without torn or stale lines, replaced at once."""
        lines = [self.header, *(layer.to_dict() for layer in self.finished.values())]
        with writing(self._path):
            self._path.parent.mkdir(exist_ok=True)
        write_file(self._path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def publish(self, output_dir: Path) -> None:
        """Rename the folder, which is whole. The journal goes with it and is removed there: where the rename
        fails, a next run still finds every finished layer.

        output_dir: not there, or an empty folder, which the rename replaces.

        Raises:
            ResourceError: `disk_full`, `output_not_writable`.
        """
        with writing(output_dir):
            self.folder.rename(output_dir)
            sync_folder(output_dir.parent)
            self.folder = output_dir
            shutil.rmtree(self.scratch)
            sync_folder(output_dir)

    @property
    def scratch(self) -> Path:
        """A folder for what nobody needs once the run has ended."""
        return self._path.parent

    @property
    def _path(self) -> Path:
        return self.folder / JOURNAL_FILE
