"""Headers come from strangers: what is well-formed is read exactly, what is not is refused with a code."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from compression.checkpoint.headers import MAX_HEADER_BYTES, read_checkpoint, read_header
from compression.errors import SourceError
from tests.compression.fake_checkpoints import (
    TINY,
    entries,
    fake_llama,
    llama_shapes,
    write_config,
    write_fake,
    write_index,
    write_raw,
)


def code_of(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        read_checkpoint(folder)
    assert str(folder.parent) not in str(caught.value)
    return caught.value.code


def test_headers_say_what_the_safetensors_library_says(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.randn(3, 5, dtype=torch.bfloat16),
        "b": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.zeros(0, 3),
        "ümlaut": torch.ones(2, dtype=torch.bool),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    infos = read_header(path)
    assert infos.keys() == tensors.keys()
    content = path.read_bytes()
    with safe_open(path, "pt") as reference:
        for name, info in infos.items():
            assert list(info.shape) == reference.get_slice(name).get_shape()
            assert info.dtype == reference.get_slice(name).get_dtype()
            stored = reference.get_tensor(name).reshape(-1).view(torch.uint8).numpy().tobytes()
            assert content[info.begin : info.end] == stored


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_is_read_whole_or_sharded(tmp_path: Path, shards: int) -> None:
    checkpoint = read_checkpoint(fake_llama(tmp_path / "model", shards=shards))
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == llama_shapes(TINY)
    assert len(checkpoint.weight_files) == shards
    assert checkpoint.config["hidden_size"] == TINY["hidden_size"]
    assert checkpoint.weight_bytes == sum(path.stat().st_size for path in checkpoint.weight_files)


def test_a_single_file_wins_over_an_index_as_in_transformers(tmp_path: Path) -> None:
    folder = fake_llama(tmp_path / "model")
    write_index(folder, {"model.norm.weight": "absent.safetensors"})
    assert [path.name for path in read_checkpoint(folder).weight_files] == ["model.safetensors"]


GOOD, SIZE = entries({"a": (2, 3), "b": (4,)})
A, B = GOOD["a"], GOOD["b"]

LYING: dict[str, tuple[Any, int]] = {
    "not JSON": (b"{" + b"x" * 40, 0),
    "not an object": (b"[1, 2]", 0),
    "leading space": (b" {}", 0),
    "not UTF-8": (b'{"\xff\xfe": 1}', 0),
    "a deep nest": (b'{"a":' * 200_000, 0),
    "a number of 10,000 digits": (b'{"a": ' + b"9" * 10_000 + b"}", 0),
    "a name twice": (b'{"a": %b, "a": %b}' % (json.dumps(A).encode(), json.dumps(A).encode()), 12),
    "unknown dtype": ({"a": {**A, "dtype": "BF17"}}, 12),
    "dtype no text": ({"a": {**A, "dtype": ["BF16"]}}, 12),
    "negative extent": ({"a": {**A, "shape": [-2, -3]}}, 12),
    "extent true": ({"a": {**A, "shape": [True, 6]}}, 12),
    "fractional extent": ({"a": {**A, "shape": [2.0, 3]}}, 12),
    "extent of 2^63": ({"a": {**A, "shape": [2**63, 0], "data_offsets": [0, 0]}}, 0),
    "65 dimensions": ({"a": {**A, "shape": [1] * 64 + [6]}}, 12),
    "shape no list": ({"a": {**A, "shape": "23"}}, 12),
    "shape larger than its bytes": ({"a": {**A, "shape": [2, 4]}}, 12),
    "shape smaller than its bytes": ({"a": {**A, "shape": [1, 3]}}, 12),
    "overflowing shape": ({"a": {**A, "shape": [2**62, 2**62, 4]}}, 12),
    "half a byte": ({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, 1),
    "end before begin": ({"a": {**A, "data_offsets": [12, 0]}}, 12),
    "negative offset": ({"a": {**A, "data_offsets": [-12, 0]}}, 12),
    "three offsets": ({"a": {**A, "data_offsets": [0, 6, 12]}}, 12),
    "past the end of the file": ({"a": A, "b": B}, SIZE - 1),
    "bytes that nobody names": ({"a": A, "b": B}, SIZE + 1),
    "overlap": ({"a": A, "b": {**B, "data_offsets": [8, 16]}}, 16),
    "gap": ({"a": A, "b": {**B, "data_offsets": [16, 24]}}, 24),
    "two tensors in the same bytes": ({"a": A, "b": A}, 12),
    "entry no object": ({"a": [1]}, 0),
    "entry with a further field": ({"a": {**A, "file": "/etc/passwd"}}, 12),
    "entry without offsets": ({"a": {"dtype": "BF16", "shape": [6]}}, 12),
    "metadata no text": ({"__metadata__": {"format": 1}, "a": A}, 12),
}


@pytest.mark.parametrize("case", LYING)
def test_a_lying_header_is_refused(tmp_path: Path, case: str) -> None:
    header, size = LYING[case]
    write_config(tmp_path, TINY)
    write_raw(tmp_path / "model.safetensors", header, size)
    assert code_of(tmp_path) == "invalid_safetensors"


STRICTER = {"leading space", "a name twice", "extent of 2^63", "65 dimensions", "entry with a further field"}
"""What the library lets pass. The format forbids the first two; torch cannot hold the next two."""


@pytest.mark.parametrize("case", [case for case in LYING if case not in STRICTER])
def test_the_library_refuses_the_same_headers(tmp_path: Path, case: str) -> None:
    path = write_raw(tmp_path / "model.safetensors", *LYING[case])
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 100_000_001, 5_000])
def test_a_header_longer_than_the_file_is_not_read(tmp_path: Path, length: int) -> None:
    write_config(tmp_path, TINY)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" + b" " * 100)
    reason = "the format allows" if length > MAX_HEADER_BYTES else "truncated"
    with pytest.raises(SourceError, match=reason) as caught:
        read_checkpoint(tmp_path)
    assert caught.value.code == "invalid_safetensors"


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    folder = fake_llama(tmp_path / "model")
    path = folder / "model.safetensors"
    os.truncate(path, keep if keep >= 0 else path.stat().st_size - 1)
    assert code_of(folder) == "invalid_safetensors"


@pytest.mark.parametrize("unit", [b"1234567,", b"[],", "\N{SNOWMAN}".encode()])
def test_a_json_bomb_is_bounded_in_memory(tmp_path: Path, unit: bytes) -> None:
    """100 MB of JSON, the most that is read, must not take down a server of ordinary size."""
    body = unit * (99_999_900 // len(unit))
    text = b'{"a":[%b0]}' % body if unit.isascii() else b'{"a":"%b"}' % body
    write_raw(tmp_path / "bomb.safetensors", text)
    script = """if True:
        import sys
        from pathlib import Path
        from compression.checkpoint.headers import read_header
        from compression.errors import SourceError
        try:
            read_header(Path(sys.argv[1]))
        except SourceError as error:
            assert error.code == "invalid_safetensors"
        else:
            raise AssertionError("read")
        status = Path("/proc/self/status").read_text()  # ru_maxrss would be the parent's before exec
        assert int(status.split("VmHWM:")[1].split()[0]) < 700_000
    """
    subprocess.run([sys.executable, "-c", script, tmp_path / "bomb.safetensors"], check=True, timeout=60)


def test_an_unknown_folder(tmp_path: Path) -> None:
    assert code_of(tmp_path / "absent") == "model_not_found"
    (tmp_path / "file").touch()
    assert code_of(tmp_path / "file") == "model_not_found"


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"a": 1, "a": 2}', b'{"a":' * 100_000])
def test_a_bad_config(tmp_path: Path, content: bytes) -> None:
    folder = fake_llama(tmp_path / "model")
    (folder / "config.json").write_bytes(content)
    assert code_of(folder) == "config_invalid"


def test_no_config(tmp_path: Path) -> None:
    assert code_of(tmp_path) == "config_missing"


def test_a_config_larger_than_any_is_not_read(tmp_path: Path) -> None:
    folder = fake_llama(tmp_path / "model")
    os.truncate(folder / "config.json", 10**12)
    assert code_of(folder) == "config_invalid"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.PT", "consolidated.00.pth", "last.ckpt"])
def test_pickles_are_refused_and_never_opened(tmp_path: Path, name: str) -> None:
    write_config(tmp_path, TINY)
    os.mkfifo(tmp_path / name)  # whoever opens it waits for ever
    assert code_of(tmp_path) == "pickle_only"


def test_pickles_beside_safetensors_are_left_alone(tmp_path: Path) -> None:
    folder = fake_llama(tmp_path / "model")
    os.mkfifo(folder / "pytorch_model.bin")
    assert read_checkpoint(folder).other_files == ()


def test_no_weights(tmp_path: Path) -> None:
    write_config(tmp_path, TINY)
    (tmp_path / "model.gguf").touch()
    assert code_of(tmp_path) == "weights_missing"


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = fake_llama(tmp_path / "model", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(SourceError, match="model-00002-of-00003") as caught:
        read_checkpoint(folder)
    assert caught.value.code == "weights_missing"


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "sub\\x.safetensors",
        "x.bin",
        "x\0.safetensors",
        "..safetensors",
        "",
        7,
        None,
        ["x.safetensors"],
    ],
)
def test_an_index_may_name_only_plain_files_beside_it(tmp_path: Path, file: Any) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        write_fake(place / "x.safetensors", llama_shapes(TINY))
    write_config(folder, TINY)
    write_index(folder, dict.fromkeys(llama_shapes(TINY), file))
    assert code_of(folder) == "index_invalid"


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_a_map(tmp_path: Path, weight_map: Any) -> None:
    write_config(tmp_path, TINY)
    write_index(tmp_path, weight_map)
    assert code_of(tmp_path) == "index_invalid"


def test_an_index_that_promises_more_than_there_is(tmp_path: Path) -> None:
    folder = fake_llama(tmp_path / "model", shards=2)
    file = "model-00001-of-00002.safetensors"
    write_index(
        folder, {"ghost": file, "model.embed_tokens.weight": file, "lm_head.weight": file.replace("1-", "2-")}
    )
    assert code_of(folder) == "index_invalid"


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    write_config(tmp_path, TINY)
    write_fake(tmp_path / "a.safetensors", {"x": (2,), "y": (2,)})
    write_fake(tmp_path / "b.safetensors", {"y": (2,)})
    write_index(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"})
    assert code_of(tmp_path) == "index_invalid"


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "tokenizer.json"],
)
@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_may_not_leave_the_folder(tmp_path: Path, name: str, absolute: bool) -> None:
    folder = fake_llama(tmp_path / "model", shards=2)
    (folder / "tokenizer.json").write_text("{}")
    outside = (folder / name).rename(tmp_path / f"outside-{name}")
    (folder / name).symlink_to(outside if absolute else f"../{outside.name}")
    assert code_of(folder) == "unsafe_link"


def test_a_folder_that_leads_out_and_a_loop(tmp_path: Path) -> None:
    folder = fake_llama(tmp_path / "model")
    (folder / "extra").symlink_to("/etc")
    assert code_of(folder) == "unsafe_link"
    (folder / "extra").unlink()
    (folder / "extra").symlink_to("extra")
    assert code_of(folder) == "unsafe_link"


def test_a_link_within_the_folder_is_followed(tmp_path: Path) -> None:
    folder = fake_llama(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "model.safetensors").symlink_to("weights.safetensors")
    assert read_checkpoint(folder).weight_files == (folder.resolve() / "weights.safetensors",)


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    fake_llama(tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    assert read_checkpoint(tmp_path / "link").folder == (tmp_path / "model").resolve()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    folder = fake_llama(tmp_path / "model")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert code_of(folder) == "source_unreadable"


def test_everything_but_weights_and_what_is_rewritten_is_copied(tmp_path: Path) -> None:
    folder = fake_llama(tmp_path / "model", shards=2)
    kept = ["generation_config.json", "tokenizer.json", "chat_template.jinja", "modeling_x.py", "LICENSE"]
    left = ["README.md", "recipe.yaml", "bitmill.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    left += ["model.gguf", "tf_model.h5", "flax_model.msgpack", "optimizer.pt", "scheduler.pth", "x.ckpt"]
    for name in kept + left:
        (folder / name).write_text(name)
    for name in ("onnx/model.onnx", "onnx/config.json", ".git/HEAD", ".cache/huggingface/x.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    assert read_checkpoint(folder).other_files == tuple(sorted([*kept, "onnx/config.json"]))


def test_headers_and_plan_import_nothing_heavy() -> None:
    script = """if True:
        import sys, compression.planning.planner
        heavy = {"torch", "numpy", "transformers", "safetensors", "compressed_tensors"}
        assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
    """
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
