"""Models from a Hub on this machine: the real client, over real connections, into a real cache."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from compression.checkpoint.headers import read_checkpoint
from compression.errors import PlanError, SourceError
from compression.events import Event, FetchProgress, PhaseChanged
from compression.hub.client import HubClient
from compression.hub.environment import HubEnvironment
from compression.hub.headers import header_folder
from compression.hub.references import HubRef
from compression.hub.snapshots import fetch_model
from compression.pipeline import compress
from compression.planning.planner import plan
from compression.recipe import Recipe
from tests.support.hub import Hub, Repository, online, running_hub
from tests.support.models import tiny_model

ID = "someone/tiny-llama"
PICKLES = ("pytorch_model.bin", "training_args.bin", "consolidated.pth")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded model with what a repository has besides: pickles, another format, weights of no index."""
    folder = tiny_model(tmp_path_factory.mktemp("hub") / "tiny-llama", shards=2)
    for name in (*PICKLES, "consolidated.safetensors", "model.gguf", ".gitattributes"):
        (folder / name).write_bytes(b"not wanted")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"not wanted")
    (folder / "LICENSE").write_text("Do as you like.")
    return folder


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        online(monkeypatch, hub, tmp_path)
        hub.add_model(ID, model)
        yield hub


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> HubEnvironment:
    home = tmp_path / "huggingface"
    return HubEnvironment(hub.url, home, home / "hub", token=None, offline=False)


def fetch(environment: HubEnvironment, ref: str = ID, log: list[tuple[int, int]] | None = None) -> Path:
    parsed = HubRef.parse(ref)
    assert parsed is not None
    return fetch_model(parsed, environment, lambda *step: None if log is None else log.append(step))


def refused(environment: HubEnvironment, ref: str = ID) -> SourceError:
    with pytest.raises(SourceError) as caught:
        fetch(environment, ref)
    return caught.value


def commit_of(hub: Hub) -> str:
    return hub.repositories["models", ID].commit


def test_what_is_wanted_is_downloaded_and_nothing_else(
    hub: Hub, environment: HubEnvironment, model: Path
) -> None:
    log: list[tuple[int, int]] = []
    folder = fetch(environment, log=log)
    assert folder == environment.cache / "models--someone--tiny-llama" / "snapshots" / commit_of(hub)
    names = {path.name for path in folder.iterdir()}
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja", ""}
    assert names & {"LICENSE", "config.json", "tokenizer.json"} == {
        "LICENSE",
        "config.json",
        "tokenizer.json",
    }
    assert "consolidated.safetensors" not in names
    for path in folder.iterdir():
        assert path.read_bytes() == (model / path.name).read_bytes()
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert log[0] == (0, total)
    assert log[-1] == (total, total)
    assert log == sorted(log)
    checkpoint, original = read_checkpoint(folder), read_checkpoint(model)
    assert checkpoint.weight_names == original.weight_names
    assert {name: info.spec for name, info in checkpoint.tensors.items()} == {
        name: info.spec for name, info in original.tensors.items()
    }


def test_a_cached_model_is_not_downloaded_again(hub: Hub, environment: HubEnvironment) -> None:
    folder = fetch(environment)
    served = hub.served.total()
    assert fetch(environment) == folder
    assert hub.served.total() == served


def test_an_unwanted_file_is_never_asked_for(hub: Hub, environment: HubEnvironment) -> None:
    fetch(environment)
    assert not [path for path in hub.requests if path.endswith((*PICKLES, ".gguf", ".onnx"))]


def test_a_cut_connection_is_taken_up_where_it_broke(
    hub: Hub, environment: HubEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = 64 << 10  # what the client has of an unfinished chunk is lost; its chunks have 10 MB
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", chunk)
    name = "model-00001-of-00002.safetensors"
    content = hub.repositories["models", ID].files[name]
    hub.cut[name] = [len(content) // 2]
    assert (fetch(environment) / name).read_bytes() == content
    assert len(content) <= hub.served[name] < len(content) + chunk
    assert hub.requests[f"GET /{ID}/resolve/{commit_of(hub)}/{name}"] == 2


def test_files_that_are_whole_are_not_downloaded_after_a_crash(hub: Hub, environment: HubEnvironment) -> None:
    files = hub.repositories["models", ID].files
    weights = [name for name in files if name.startswith("model-")]

    class Crash(Exception):
        pass

    def crash(_done: int, _total: int) -> None:
        if hub.served[weights[1]]:
            raise Crash

    with pytest.raises(Crash):
        fetch_model(HubRef(ID), environment, crash)
    fetch(environment)
    assert hub.served[weights[0]] == len(files[weights[0]])


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "tokenizer.json"])
def test_a_wrong_digest_is_refused_and_the_next_run_starts_clean(
    hub: Hub, environment: HubEnvironment, name: str
) -> None:
    hub.corrupt.add(name)
    error = refused(environment)
    assert (error.code, name in error.message) == ("hub_digest_mismatch", True)
    hub.corrupt.clear()
    folder = fetch(environment)
    assert (folder / name).read_bytes() == hub.repositories["models", ID].files[name]


def test_a_damaged_file_of_the_cache_is_found(hub: Hub, environment: HubEnvironment) -> None:
    path = next(fetch(environment).glob("model-*"))
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    assert refused(environment).code == "hub_digest_mismatch"
    assert (fetch(environment) / path.name).read_bytes() == hub.repositories["models", ID].files[path.name]


@pytest.mark.parametrize(
    ("ref", "code"),
    [
        ("someone/nothing", "hub_repository_not_found"),
        (f"{ID}@v9", "hub_revision_not_found"),
        (f"{ID}@{'0' * 40}", "hub_revision_not_found"),
        ("someone/gated", "hub_access_denied"),
        ("someone/private", "hub_repository_not_found"),
        ("someone/pickles", "pickle_only"),
        ("someone/empty", "weights_missing"),
    ],
)
def test_refusals_say_what_to_do(
    hub: Hub, environment: HubEnvironment, model: Path, tmp_path: Path, ref: str, code: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    shutil.copytree(tmp_path / "empty", tmp_path / "pickles")
    (tmp_path / "pickles" / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    hub.add_model("someone/empty", tmp_path / "empty")
    hub.add_model("someone/pickles", tmp_path / "pickles")
    hub.add_model("someone/gated", model, gated=True)
    hub.add_model("someone/private", tmp_path / "empty", token="hf_right")
    error = refused(environment, ref)
    assert error.code == code
    assert error.hint


def test_a_token_opens_a_private_model(hub: Hub, environment: HubEnvironment, model: Path) -> None:
    hub.add_model("someone/private", model, token="hf_right")
    wrong = dataclasses.replace(environment, token="hf_wrong")
    assert refused(wrong, "someone/private").code == "hub_repository_not_found"
    right = dataclasses.replace(environment, token="hf_right")
    assert (fetch(right, "someone/private") / "config.json").exists()
    assert "hf_right" not in repr(right)


def test_branches_and_commits(hub: Hub, environment: HubEnvironment) -> None:
    hub.repositories["models", ID].branches["v1.0"] = commit_of(hub)
    folder = fetch(environment, f"{ID}@v1.0")
    assert fetch(environment, f"{ID}@{commit_of(hub)}") == folder
    assert folder.name == commit_of(hub)


def test_nobody_answers(environment: HubEnvironment) -> None:
    closed = dataclasses.replace(environment, endpoint="http://127.0.0.1:9")
    assert refused(closed).code == "hub_unreachable"


def test_offline_takes_what_is_cached_and_refuses_the_rest(hub: Hub, environment: HubEnvironment) -> None:
    offline = dataclasses.replace(environment, offline=True)
    assert refused(offline).code == "hub_offline"
    folder = fetch(environment)
    asked = hub.requests.total()
    assert fetch(offline) == folder
    assert fetch(offline, f"{ID}@{folder.name}") == folder
    assert hub.requests.total() == asked
    error = refused(offline, f"{ID}@v2")
    assert (error.code, "HF_HUB_OFFLINE" in error.hint) == ("hub_offline", True)


def test_headers_are_those_of_the_weights_and_little_is_transferred(
    hub: Hub, environment: HubEnvironment, model: Path
) -> None:
    with HubClient(environment) as client:
        folder = header_folder(client, client.commit("model", HubRef(ID)), environment)
    planned, original = read_checkpoint(folder), read_checkpoint(model)
    assert planned.config == original.config
    assert {n: (i.spec, i.begin, i.end) for n, i in planned.tensors.items()} == {
        n: (i.spec, i.begin, i.end) for n, i in original.tensors.items()
    }
    assert planned.weight_bytes == original.weight_bytes
    assert hub.served.total() < original.weight_bytes / 5
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) < original.weight_bytes / 5


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({f"{number}.txt": b"" for number in range(2000)} | {"model.safetensors": b""}, "too_many_files"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "sub/a.safetensors"}}'}, "index_invalid"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "a.bin"}}'}, "index_invalid"),
        ({"model.safetensors.index.json": b"{"}, "index_invalid"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "a.safetensors"}}'}, "weights_missing"),
    ],
)
def test_a_repository_that_cannot_be_planned(
    hub: Hub, environment: HubEnvironment, files: dict[str, bytes], code: str
) -> None:
    hub.repositories["models", "someone/odd"] = Repository(files)
    with HubClient(environment) as client:
        commit = client.commit("model", HubRef("someone/odd"))
        with pytest.raises(SourceError) as caught:
            header_folder(client, commit, environment)
    assert caught.value.code == code


@pytest.mark.parametrize("header", [b"", b"\xff" * 8, b"\xff" * 7 + b"\x00{}", b"\x02\0\0\0\0\0\0\0[]"])
def test_a_header_that_lies_is_read_no_further_than_the_file(
    hub: Hub, environment: HubEnvironment, header: bytes
) -> None:
    hub.repositories["models", "someone/odd"] = Repository(
        {"config.json": b"{}", "model.safetensors": header}
    )
    with HubClient(environment) as client:
        folder = header_folder(client, client.commit("model", HubRef("someone/odd")), environment)
    with pytest.raises(SourceError) as caught:
        read_checkpoint(folder)
    assert caught.value.code == "invalid_safetensors"


@pytest.fixture
def as_configured(environment: HubEnvironment, monkeypatch: pytest.MonkeyPatch) -> HubEnvironment:
    """The environment in the variables of this process."""
    monkeypatch.setenv("HF_ENDPOINT", environment.endpoint)
    monkeypatch.setenv("HF_HOME", str(environment.home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return environment


@pytest.mark.usefixtures("as_configured")
def test_compress_takes_a_name_and_gives_what_the_folder_gives(hub: Hub, model: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    recipe = Recipe.from_short("W8A8", has_dataset=False)
    report = compress(ID, recipe, tmp_path / "out", on_event=told.append, self_check=False)
    compress(model, recipe, tmp_path / "local", self_check=False)
    assert [event.phase for event in told if isinstance(event, PhaseChanged)][:3] == [
        "fetch",
        "plan",
        "compress",
    ]
    assert any(isinstance(event, FetchProgress) and event.done == event.total for event in told)
    assert report.phases["fetch"] > 0
    for file in (tmp_path / "local").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    record = json.loads((tmp_path / "out" / "bitmill.json").read_text())
    assert record["provenance"]["origins"] == {"model": {"hub": ID, "revision": commit_of(hub)}}
    local = json.loads((tmp_path / "local" / "bitmill.json").read_text())
    assert record["provenance"]["fingerprint"] == local["provenance"]["fingerprint"]
    assert (tmp_path / "out" / "README.md").read_text().startswith("# tiny-llama, compressed")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_what_cannot_succeed_is_refused_before_the_download(
    as_configured: HubEnvironment, tmp_path: Path
) -> None:
    recipe = Recipe.from_short("W4A16", has_dataset=False, group_size=48)
    with pytest.raises(PlanError, match="48"):
        compress(ID, recipe, tmp_path / "out")
    assert not as_configured.cache.exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.usefixtures("as_configured")
def test_a_plan_of_a_name_is_that_of_its_folder(model: Path) -> None:
    recipe = Recipe.from_short("W4A16", has_dataset=False)
    by_name, by_folder = plan(ID, recipe).to_dict(), plan(model, recipe).to_dict()
    del by_name["disk"], by_folder["disk"]  # only headers are here, not the files that are copied
    assert by_name == by_folder
    with pytest.raises(PlanError) as caught:
        plan("someone/nothing", recipe)
    assert [problem.code for problem in caught.value.problems] == ["hub_repository_not_found"]


def test_a_snapshot_of_the_cache_is_a_model_folder_and_other_links_are_not(
    environment: HubEnvironment, tmp_path: Path
) -> None:
    folder = fetch(environment)
    assert read_checkpoint(folder).config["model_type"] == "llama"
    outside = tmp_path / "secret.json"
    outside.write_text("{}")
    (folder / "extra.json").symlink_to(outside)
    with pytest.raises(SourceError) as caught:
        read_checkpoint(folder)
    assert caught.value.code == "unsafe_link"


@pytest.mark.parametrize(
    "text",
    [
        "gpt2",
        "/a/b",
        "a/b/c",
        "../b",
        "a/..",
        "a/b@",
        "a/b@../x",
        "a b/c",
        "a/b@x//y",
        "s3://a/b",
        "",
        "a/b\n",
    ],
)
def test_what_is_no_name_on_the_hub(text: str) -> None:
    assert HubRef.parse(text) is None


def test_the_environment_is_read_as_the_libraries_do(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_stored\n")
    found = HubEnvironment.read(
        {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://mirror/"}
    )
    assert (found.endpoint, found.cache, found.token, found.offline) == (
        "http://mirror",
        tmp_path / "hub",
        "hf_stored",
        True,
    )
    assert HubEnvironment.read({}).endpoint == "https://huggingface.co"
    given = HubEnvironment.read({"HF_TOKEN": "hf_given", "HF_HUB_CACHE": "/cache", "HF_HOME": str(tmp_path)})
    assert (given.token, given.cache, given.offline) == ("hf_given", Path("/cache"), False)
