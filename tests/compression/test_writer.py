"""Shards are what the safetensors library would write, and are there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compression.checkpoint.headers import read_checkpoint, read_header
from compression.checkpoint.layout import TensorSpec, build_header, file_size
from compression.checkpoint.reader import TORCH_DTYPES, open_unchanged, read_infos, read_tensors
from compression.checkpoint.writer import (
    copy_file,
    read_shard,
    write_file,
    write_index,
    write_shard,
)
from compression.errors import SourceError
from tests.compression.fake_checkpoints import TINY, fake_llama, write_fake


def tensors_of_every_dtype() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (24, 16), dtype=torch.uint8, generator=generator)
    tensors = {
        f"of.{name}": raw.view(dtype).clone() for name, dtype in TORCH_DTYPES.items() if name != "BOOL"
    }
    return tensors | {
        "of.BOOL": raw > 127,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 7),
        "transposed": torch.arange(12).reshape(3, 4).t(),
        "every second": torch.arange(12)[::2],
        'quote " and ümlaut \t': torch.ones(1),
    }


def same(left: Tensor, right: Tensor) -> bool:
    """Equal bit for bit, NaNs included."""
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*raw)


def test_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = {name: t for name, t in tensors_of_every_dtype().items() if name != "of.F8_E8M0"}
    shard = write_shard(tmp_path / "ours.safetensors", tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        tmp_path / "theirs.safetensors",
        metadata={"format": "pt"},
    )
    content = (tmp_path / "ours.safetensors").read_bytes()
    assert content == (tmp_path / "theirs.safetensors").read_bytes()
    assert shard.sha256 == hashlib.sha256(content).hexdigest()
    assert shard.size == len(content)
    assert set(shard.tensors) == tensors.keys()
    assert shard.tensor_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert sorted(os.listdir(tmp_path)) == ["ours.safetensors", "theirs.safetensors"]


def test_every_dtype_comes_back_and_the_library_reads_it(tmp_path: Path) -> None:
    tensors = tensors_of_every_dtype()
    path = tmp_path / "shard.safetensors"
    write_shard(path, tensors)
    read = read_infos(read_header(path).values())
    assert all(same(read[name], tensor) for name, tensor in tensors.items())
    pointers = [tensor.data_ptr() for tensor in read.values() if tensor.numel()]
    assert len(set(pointers)) == len(pointers)
    write_shard(path, {name: t for name, t in tensors.items() if name != "of.F8_E8M0"})
    loaded = load_file(path)
    assert all(same(tensor, tensors[name]) for name, tensor in loaded.items())


def test_order_of_the_mapping_does_not_matter(tmp_path: Path) -> None:
    tensors = tensors_of_every_dtype()
    first = write_shard(tmp_path / "a.safetensors", tensors)
    second = write_shard(tmp_path / "b.safetensors", dict(reversed(tensors.items())))
    assert first.sha256 == second.sha256


def test_tensors_are_copied_from_file_to_file(tmp_path: Path) -> None:
    """Larger than a chunk, under another name, and beside one from memory."""
    big = torch.arange(5 << 20, dtype=torch.float32)
    save_file({"big": big, "small": torch.ones(3)}, tmp_path / "source.safetensors")
    infos = read_header(tmp_path / "source.safetensors")
    write_shard(tmp_path / "out.safetensors", {"renamed": infos["big"], "mine": torch.zeros(2)})
    loaded = load_file(tmp_path / "out.safetensors")
    assert loaded.keys() == {"renamed", "mine"}
    assert same(loaded["renamed"], big)


def test_a_tensor_larger_than_a_chunk_is_read_whole(tmp_path: Path) -> None:
    big = torch.arange(5 << 20, dtype=torch.float32)
    save_file({"small": torch.ones(3), "big": big}, tmp_path / "model.safetensors")
    assert same(read_infos(read_header(tmp_path / "model.safetensors").values())["big"], big)


def test_a_header_tells_the_size_of_a_file_before_it_is_written(tmp_path: Path) -> None:
    tensors = tensors_of_every_dtype()
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    specs = {name: TensorSpec(names[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    shard = write_shard(tmp_path / "shard.safetensors", tensors)
    assert file_size(specs) == shard.size
    assert (tmp_path / "shard.safetensors").read_bytes().startswith(build_header(specs)[0])


def test_a_shard_on_disk_is_described_as_when_it_was_written(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "shard.safetensors", tensors_of_every_dtype())
    assert read_shard(tmp_path / "shard.safetensors") == shard
    os.truncate(tmp_path / "shard.safetensors", shard.size - 1)
    with pytest.raises(SourceError):
        read_shard(tmp_path / "shard.safetensors")


def test_an_index_as_transformers_reads_it(tmp_path: Path) -> None:
    shards = [
        write_shard(
            tmp_path / f"model-{number:05d}-of-00002.safetensors", {f"t{number}": torch.zeros(number)}
        )
        for number in (1, 2)
    ]
    write_index(tmp_path, shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 12},
        "weight_map": {"t1": "model-00001-of-00002.safetensors", "t2": "model-00002-of-00002.safetensors"},
    }


def test_a_file_replaces_another_and_a_leftover(tmp_path: Path) -> None:
    target = tmp_path / "config.json"
    target.write_bytes(b"old")
    (tmp_path / ".config.json.writing").write_bytes(b"left by a process that was killed")
    write_file(target, b"new")
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_failure_in_the_middle_leaves_what_was_there(tmp_path: Path) -> None:
    folder = fake_llama(tmp_path / "model")
    infos = read_checkpoint(folder).tensors
    target = tmp_path / "shard.safetensors"
    target.write_bytes(b"old")
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(SourceError) as caught:
        write_shard(target, dict(infos))
    assert caught.value.code == "source_changed"
    assert target.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["model", "shard.safetensors"]


DISK_FULL = """if True:
    import os, resource, sys, torch
    from pathlib import Path
    from compression.checkpoint.headers import read_header
    from compression.checkpoint.writer import write_file, write_shard
    from compression.errors import ResourceError
    folder = Path(sys.argv[1])
    infos = read_header(folder / "source.safetensors")
    target = folder / "out.safetensors"
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    for attempt in (
        lambda: write_shard(target, {"x": torch.zeros(1 << 20)}),
        lambda: write_shard(target, infos),
        lambda: write_file(target, bytes(2 << 20)),
    ):
        try:
            attempt()
        except ResourceError as error:
            assert error.code == "disk_full"
            assert target.name in error.message
            assert str(folder) not in error.message
        else:
            raise AssertionError("written")
        assert target.read_bytes() == b"what was there"
        assert sorted(os.listdir(folder)) == [target.name, "source.safetensors"]
"""


def test_a_full_disk_has_a_code_and_leaves_nothing(tmp_path: Path) -> None:
    write_fake(tmp_path / "source.safetensors", {"x": (1 << 20,)})
    (tmp_path / "out.safetensors").write_bytes(b"what was there")
    subprocess.run([sys.executable, "-c", DISK_FULL, tmp_path], check=True, timeout=120)


def test_copied_files_are_byte_for_byte(tmp_path: Path) -> None:
    folder = fake_llama(tmp_path / "model")
    content = os.urandom(1000) * 10_000
    (folder / "assets").mkdir()
    (folder / "assets" / "tokenizer.model").write_bytes(content)
    checkpoint = read_checkpoint(folder)
    assert checkpoint.other_files == ("assets/tokenizer.model",)
    copy_file(checkpoint, "assets/tokenizer.model", tmp_path / "out" / "assets" / "tokenizer.model")
    assert (tmp_path / "out" / "assets" / "tokenizer.model").read_bytes() == content


def test_a_file_that_became_a_link_is_not_copied(tmp_path: Path) -> None:
    folder = fake_llama(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    checkpoint = read_checkpoint(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/etc/passwd")
    with pytest.raises(SourceError) as caught:
        copy_file(checkpoint, "tokenizer.json", tmp_path / "out" / "tokenizer.json")
    assert caught.value.code == "unsafe_link"
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("change", ["longer", "shorter", "touched", "replaced", "gone", "link"])
def test_a_source_that_changed_after_the_plan_is_not_read(tmp_path: Path, change: str) -> None:
    folder = fake_llama(tmp_path / "model", TINY)
    checkpoint = read_checkpoint(folder)
    path = folder / "model.safetensors"
    size = path.stat().st_size
    if change in ("longer", "shorter"):
        os.truncate(path, size + (1 if change == "longer" else -1))
    elif change == "touched":
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    else:
        stat = path.stat()
        path.rename(tmp_path / "elsewhere.safetensors")
        if change == "link":
            path.symlink_to(tmp_path / "elsewhere.safetensors")
        elif change == "replaced":
            path.write_bytes((tmp_path / "elsewhere.safetensors").read_bytes())
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for read in (
        lambda: read_tensors(checkpoint, ["model.norm.weight"]),
        lambda: write_shard(tmp_path / "s.safetensors", {"x": checkpoint.tensors["model.norm.weight"]}),
    ):
        with pytest.raises(SourceError) as caught:
            read()
        assert caught.value.code == "source_changed"
    assert not (tmp_path / "s.safetensors").exists()


def test_a_source_that_changes_while_it_is_read(tmp_path: Path) -> None:
    info = read_checkpoint(fake_llama(tmp_path / "model")).tensors["model.norm.weight"]
    times: list[int] = []

    def touch_while_open() -> None:
        with open_unchanged(info):
            times.append(len(times))
            os.utime(info.file, ns=(0, len(times)))

    for _ in range(2):  # the second time it is not even opened for reading
        with pytest.raises(SourceError) as caught:
            touch_while_open()
        assert caught.value.code == "source_changed"
    assert times == [0]


def test_a_dtype_without_a_torch_type_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header, _ = build_header({"packed": TensorSpec("F4", (4,))})
    path.write_bytes(header + bytes(2))
    with pytest.raises(SourceError, match="packed is F4") as caught:
        read_infos(read_header(path).values())
    assert caught.value.code == "unsupported_dtype"


def test_files_are_closed_after_each_call(tmp_path: Path) -> None:
    folder = fake_llama(tmp_path / "model", shards=3)
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = read_checkpoint(folder)
    tensors = read_tensors(checkpoint, checkpoint.tensors)
    write_shard(tmp_path / "s.safetensors", tensors)
    assert len(os.listdir("/proc/self/fd")) == before
    mapped = Path("/proc/self/maps").read_text()
    assert str(folder) not in mapped
