"""Models in S3, from a real server: planned from headers, fetched once, pinned, and refused with reasons."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from compression import PlanError, Recipe, SourceError, compress, plan
from compression.checkpoint.headers import read_checkpoint
from compression.hub.environment import HubEnvironment
from compression.s3 import client as s3_module
from compression.s3.client import OnBytes, S3Ref
from compression.s3.models import MAX_OBJECTS, S3ModelRef, fetch_s3_model, s3_header_folder
from tests.support.models import tiny_model
from tests.support.s3 import S3Server

UNWANTED = ("pytorch_model.bin", "training_args.pt", "model.gguf", "other.safetensors", "onnx/model.json")
WEIGHTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
RECIPE = Recipe.from_short("W8A8", method="rtn", has_dataset=False)


class Stopped(Exception):
    """What ends a download."""


def ignore(_done: int, _total: int) -> None:
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded model."""
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny", shards=2)


@pytest.fixture
def place(s3: S3Server, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the model is in S3, with what is in folders besides. Who asks may read; the cache is empty."""
    s3.use(monkeypatch, tmp_path)
    key = f"models/{tmp_path.name}/tiny"
    s3.put_folder(model, key)
    for name in UNWANTED:
        s3.put(f"{key}/{name}", b"not wanted")
    return f"s3://texts/{key}"


def reference(text: str) -> S3ModelRef:
    ref = S3ModelRef.parse(text)
    assert ref is not None
    return ref


def put(s3: S3Server, place: str, name: str, content: bytes) -> None:
    s3.put(f"{reference(place).folder.key}/{name}", content)


def fetched(place: str, on_bytes: OnBytes = ignore) -> tuple[Path, S3ModelRef]:
    return fetch_s3_model(reference(place), HubEnvironment.read().home, on_bytes)


def planned(place: str) -> tuple[Path, S3ModelRef]:
    return s3_header_folder(reference(place), HubEnvironment.read().home)


def refused(place: str) -> str:
    """The code, which planning and fetching have in common."""
    codes = set()
    for ask in (planned, fetched):
        with pytest.raises(SourceError) as caught:
            ask(place)
        assert caught.value.hint
        assert "secret" not in str(caught.value)
        codes.add(caught.value.code)
    (code,) = codes
    return code


@pytest.fixture
def gets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The name and range of every GET of an object from here on."""
    asked: list[tuple[str, str]] = []

    def note(params: dict[str, str], **_: object) -> None:
        assert params["IfMatch"]
        asked.append((params["Key"].rpartition("/")[2], params.get("Range", "")))

    def listening(**options: Any) -> Any:
        client = s3_module.client(**options)
        client.meta.events.register("provide-client-params.s3.GetObject", note)
        return client

    monkeypatch.setattr("compression.s3.models.client", listening)
    return asked


def test_headers_are_those_of_the_weights_and_little_is_transferred(
    place: str, model: Path, gets: list[tuple[str, str]]
) -> None:
    folder, _ = planned(place)
    found, original = read_checkpoint(folder), read_checkpoint(model)
    assert found.config == original.config
    assert {n: (i.spec, i.begin, i.end) for n, i in found.tensors.items()} == {
        n: (i.spec, i.begin, i.end) for n, i in original.tensors.items()
    }
    assert found.weight_bytes == original.weight_bytes
    assert {path.name for path in folder.iterdir()} == {path.name for path in model.iterdir()}
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) < original.weight_bytes / 5
    spans = [re.fullmatch(r"bytes=(\d+)-(\d+)", span) for _, span in gets]
    assert sum(int(span[2]) - int(span[1]) for span in spans if span) < original.weight_bytes / 2
    assert all(spans)


def test_headers_of_a_revision_are_fetched_once(place: str, gets: list[tuple[str, str]]) -> None:
    folder, pinned = planned(place)
    gets.clear()
    assert planned(str(pinned)) == (folder, pinned)
    assert gets == [("model.safetensors.index.json", gets[0][1])]


def test_the_folder_is_the_models_own_files(place: str, model: Path) -> None:
    log: list[tuple[int, int]] = []
    folder, pinned = fetched(place, lambda *step: log.append(step))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in model.iterdir()
    }
    total = sum(path.stat().st_size for path in model.iterdir())
    assert (log[0], log[-1]) == ((0, total), (total, total))
    assert log == sorted(log)
    assert planned(place)[1] == pinned


def test_what_is_whole_needs_no_network(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, pinned = fetched(place)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert fetched(str(pinned)) == planned(str(pinned)) == (folder, pinned)
    assert refused(place) == "s3_unreachable"


def test_files_that_are_whole_are_not_downloaded_after_a_stop(
    place: str, model: Path, gets: list[tuple[str, str]]
) -> None:
    before = sum(path.stat().st_size for path in model.iterdir()) - (model / WEIGHTS[1]).stat().st_size
    half_done: list[Path] = []

    def stop(done: int, _total: int) -> None:
        if done > before:
            half_done.extend(HubEnvironment.read().home.rglob("tmp*"))
            raise Stopped

    with pytest.raises(Stopped):
        fetched(place, stop)
    assert (WEIGHTS[1], "") in gets
    gets.clear()
    folder, _ = fetched(place)
    assert [name for name, span in gets if not span] == [WEIGHTS[1]]
    assert (folder / WEIGHTS[1]).read_bytes() == (model / WEIGHTS[1]).read_bytes()
    assert [path.parent for path in half_done] == [folder.parent]  # a kill would leave it there
    assert not half_done[0].exists()


def test_every_change_is_noticed(place: str, s3: S3Server, model: Path) -> None:
    _, pinned = planned(place)
    put(s3, place, "README.md", b"A card.")
    assert refused(str(pinned)) == "model_changed"
    _, pinned = planned(place)
    weights = bytearray((model / WEIGHTS[0]).read_bytes())
    weights[-1] ^= 1  # same size, same header
    put(s3, place, WEIGHTS[0], bytes(weights))
    assert refused(str(pinned)) == "model_changed"
    _, pinned = planned(place)
    put(s3, place, "pytorch_model.bin", b"not wanted, and new")
    assert planned(str(pinned))[1] == pinned


@pytest.mark.parametrize("gone", [False, True])
def test_a_change_after_the_listing_is_noticed(place: str, s3: S3Server, gone: bool) -> None:
    def change(done: int, _total: int) -> None:
        if done:
            key = f"{reference(place).folder.key}/{WEIGHTS[1]}"
            s3.client.delete_object(Bucket="texts", Key=key) if gone else s3.put(key, b"other")

    with pytest.raises(SourceError) as caught:
        fetched(place, change)
    assert caught.value.code == "model_changed"
    assert not list(HubEnvironment.read().home.rglob("*.whole"))


def test_a_folder_without_a_model_is_refused(place: str, s3: S3Server) -> None:
    assert refused(f"{place}/onnx") == "model_not_found"
    assert refused("s3://texts/models/nothing") == "model_not_found"
    put(s3, place, "pickles/config.json", b"{}")
    assert refused(f"{place}/pickles") == "weights_missing"
    put(s3, place, "pickles/pytorch_model.bin", b"\x80\x02.")
    assert refused(f"{place}/pickles") == "pickle_only"
    put(
        s3,
        place,
        "pickles/model.safetensors.index.json",
        b'{"weight_map": {"a": "../tiny/model.safetensors"}}',
    )
    assert refused(f"{place}/pickles") == "index_invalid"


@pytest.mark.usefixtures("place")
def test_what_may_not_be_read_or_is_not_there_is_refused() -> None:
    assert refused("s3://private/model") == "s3_access_denied"
    assert refused("s3://no-such-bucket/model") in ("s3_access_denied", "s3_object_not_found")


def test_names_that_are_no_files_are_left_out(
    place: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = planned(place)
    for name in ("a\\b.json", f"{'n' * 60}.json"):
        put(s3, place, name, b"{}")
    monkeypatch.setattr("compression.s3.models._MAX_NAME_BYTES", 60)  # this server's own limit is 255
    assert planned(place) == before


def test_an_unending_folder_is_refused(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_OBJECTS > 1000
    monkeypatch.setattr("compression.s3.models.MAX_OBJECTS", 3)
    assert refused(place) == "too_many_files"


def test_compress_gives_what_the_folder_gives(place: str, model: Path, tmp_path: Path) -> None:
    compress(place, RECIPE, tmp_path / "out", self_check=False)
    compress(model, RECIPE, tmp_path / "local", self_check=False)
    written, expected = (sorted((tmp_path / name).glob("*.safetensors")) for name in ("out", "local"))
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in expected] != []
    provenance = json.loads((tmp_path / "out" / "bitmill.json").read_text())["provenance"]
    revision = planned(place)[1].revision
    assert provenance["origins"] == {"model": {"s3": place, "revision": revision}}


def test_a_plan_names_the_model_and_its_problems(place: str) -> None:
    assert plan(place, RECIPE).to_dict()["source"] == "tiny"
    with pytest.raises(PlanError) as caught:
        plan("s3://texts/models/nothing", RECIPE)
    assert [problem.code for problem in caught.value.problems] == ["model_not_found"]


REVISION = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "key", "revision"),
    [
        ("s3://bucket/folder", "folder", None),
        ("s3://bucket/some/folder/", "some/folder", None),
        (f"s3://bucket/folder@{REVISION}", "folder", REVISION),
        ("s3://bucket/folder@v1", "folder@v1", None),
        (f"s3://bucket/folder@{REVISION.upper()}", f"folder@{REVISION.upper()}", None),
        (f"s3://bucket/a@{REVISION}/b@{REVISION}", f"a@{REVISION}/b", REVISION),
    ],
)
def test_references(text: str, key: str, revision: str | None) -> None:
    ref = reference(text)
    assert (ref.folder, ref.revision) == (S3Ref("bucket", key), revision)
    assert S3ModelRef.parse(str(ref)) == ref


@pytest.mark.parametrize(
    "text",
    ["s3://bucket", "s3://bucket/", f"s3://bucket@{REVISION}", "s3://bucket/a/../b", "s3://b/a//", "a/b"],
)
def test_what_is_no_reference(text: str) -> None:
    assert S3ModelRef.parse(text) is None
