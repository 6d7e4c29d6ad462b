"""Datasets in S3, from a real server: fetched once, pinned, and refused with reasons."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from pydantic import ValidationError

from compression import Calibration, DatasetSpec, Evaluation, PlanError, Recipe, SourceError, compress, plan
from compression.data.documents import dataset_digest, open_documents
from compression.data.sources import Sources, fetch
from compression.events import Event, FetchProgress
from compression.s3.client import S3Ref
from tests.support.s3 import ADMIN, S3Server

TEXTS = ["The first text.", "The second text."]


def parquet_bytes() -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(arrow.table({"text": TEXTS}), buffer)
    return buffer.getvalue()


FILES = {
    "a.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode(),
    "a.csv": "\n".join(["text", *TEXTS]).encode(),
    "a.txt": "\n\n".join(TEXTS).encode(),
    "a.parquet": parquet_bytes(),
}


@pytest.fixture(autouse=True)
def _a_reader(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials of one who may read, and an empty cache."""
    s3.use(monkeypatch, tmp_path)


def fetched(dataset: Any, model: Path = Path("model")) -> Sources:
    told: list[Event] = []
    spec = DatasetSpec.model_validate(dataset)
    return fetch(model, spec, Calibration(), Evaluation(), told.append)


def documents(sources: Sources) -> list[Any]:
    assert sources.dataset is not None
    return list(open_documents(sources.dataset))


def refused(dataset: Any) -> SourceError:
    with pytest.raises(SourceError) as caught:
        fetched(dataset)
    assert "secret" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_the_dataset_that_it_is_locally(
    s3: S3Server, tmp_path: Path, name: str
) -> None:
    s3.put(f"some/folder/{name}", FILES[name])
    found = fetched(f"s3://texts/some/folder/{name}")
    assert documents(found) == TEXTS
    (tmp_path / name).write_bytes(FILES[name])
    assert found.dataset is not None
    assert dataset_digest(found.dataset) == dataset_digest(DatasetSpec(path=str(tmp_path / name)))


def test_columns_are_those_that_were_asked_for(s3: S3Server) -> None:
    turns = [{"role": "user", "content": "Hi"}]
    s3.put("chats.jsonl", json.dumps({"text": "no", "body": "yes", "chat": turns}).encode())
    assert documents(fetched({"s3": "s3://texts/chats.jsonl", "text_column": "body"})) == ["yes"]
    assert documents(fetched({"s3": "s3://texts/chats.jsonl", "messages_column": "chat"})) == [turns]


def test_what_was_found_is_pinned(s3: S3Server) -> None:
    s3.put("pinned.txt", b"before")
    found = fetched("s3://texts/pinned.txt")
    assert found.pinned is not None
    assert found.origins["dataset"] == {
        "s3": "s3://texts/pinned.txt", "etag": found.pinned.etag, "version_id": None, "size": 6,
    }  # fmt: skip
    s3.put("pinned.txt", b"behind")
    assert documents(fetched("s3://texts/pinned.txt")) == ["behind"]
    assert documents(fetched(found.pinned)) == ["before"]


def test_a_pinned_object_that_is_here_needs_no_network(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put("here.txt", b"words")
    pinned = fetched("s3://texts/here.txt").pinned
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert documents(fetched(pinned)) == ["words"]


def test_elsewhere_it_is_said_that_it_changed(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put("changed.txt", b"before")
    pinned = fetched("s3://texts/changed.txt").pinned
    s3.put("changed.txt", b"behind")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "elsewhere"))
    assert refused(pinned).code == "dataset_changed"


def test_a_bucket_with_versions_gives_the_same_text_everywhere(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put("a.txt", b"before", bucket="versioned")
    pinned = fetched("s3://versioned/a.txt").pinned
    assert pinned is not None
    assert pinned.version_id
    s3.put("a.txt", b"behind", bucket="versioned")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "elsewhere"))
    assert documents(fetched(pinned)) == ["before"]
    assert documents(fetched("s3://versioned/a.txt")) == ["behind"]


@pytest.mark.parametrize(
    ("dataset", "code"),
    [
        ("s3://texts/nothing.txt", "s3_object_not_found"),
        ("s3://private/a.txt", "s3_access_denied"),
    ],
)
def test_refusals(s3: S3Server, dataset: str, code: str) -> None:
    s3.put("a.txt", b"secret", bucket="private")
    error = refused(dataset)
    assert error.code == code
    assert dataset in error.message
    assert error.hint


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials(s3: S3Server, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put("a.txt", b"words")
    monkeypatch.setenv(variable, "somebody-else")
    error = refused("s3://texts/a.txt")
    assert error.code == "s3_access_denied"
    assert "somebody-else" not in str(error)


def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert refused("s3://texts/a.txt").code == "s3_access_denied"


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "no address"])
def test_nobody_answers(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert refused("s3://texts/a.txt").code == "s3_unreachable"


@pytest.fixture
def torn() -> Iterator[str]:
    """A server that announces more than it sends."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for _ in range(10):
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\nETag: "1"\r\n\r\nhalf')

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_an_object_that_breaks_off_leaves_nothing(
    torn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", torn)
    assert refused("s3://texts/a.txt").code == "s3_unreachable"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_run_tells_of_it_and_keeps_where_it_came_from(
    s3: S3Server, tiny_llama: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    s3.put("texts.jsonl", tiny_texts.read_bytes())
    told: list[Event] = []
    compress(
        tiny_llama,
        Recipe.from_short("W8A8", method="rtn", has_dataset=True),
        tmp_path / "out",
        dataset=DatasetSpec.model_validate("s3://texts/texts.jsonl"),
        calibration=Calibration(num_calibration_samples=1, max_seq_length=64),
        evaluation=Evaluation(num_samples=1),
        on_event=told.append,
    )
    size = tiny_texts.stat().st_size
    fetches = [event for event in told if isinstance(event, FetchProgress)]
    assert fetches[-1] == FetchProgress("dataset", "s3://texts/texts.jsonl", size, size)
    origin = json.loads((tmp_path / "out" / "bitmill.json").read_text())["provenance"]["origins"]["dataset"]
    assert (origin["s3"], origin["size"]) == ("s3://texts/texts.jsonl", size)


def test_a_file_of_another_kind_is_refused_by_the_plan(tiny_llama: Path) -> None:
    recipe = Recipe.from_short("W8A8", has_dataset=True)
    with pytest.raises(PlanError) as caught:
        plan(tiny_llama, recipe, dataset=DatasetSpec.model_validate("s3://texts/weights.bin"))
    problem = caught.value.problems[0]
    assert (problem.code, problem.pointer) == ("dataset_format_unsupported", "/dataset")


@pytest.mark.parametrize(
    "text",
    [
        "s3://texts", "s3://texts/", "s3:///a.txt", "s3://a b/a.txt", "s3://texts//a.txt", "s3://texts/../a.txt",
        "s3://texts/./a.txt", "s3://texts/a\n.txt", "s3://../a.txt", "s3://texts/folder/", "http://texts/a.txt",
    ],
)  # fmt: skip
def test_what_is_no_object(text: str) -> None:
    assert S3Ref.parse(text) is None
    with pytest.raises(ValidationError):
        DatasetSpec(s3=text)


@pytest.mark.parametrize(
    "fields",
    [
        {"s3": "s3://texts/a.txt", "path": "a.txt"},
        {"s3": "s3://texts/a.txt", "split": "train"},
        {"path": "a.txt", "etag": "0"},
        {"hub": "c4", "version_id": "0"},
    ],
)
def test_fields_that_do_not_fit(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DatasetSpec.model_validate(fields)


@pytest.mark.parametrize(
    ("prefix", "inside"),
    [
        ("s3://texts", True),
        ("s3://texts/", True),
        ("s3://texts/data", True),
        ("s3://texts/data/a.txt", True),
        ("s3://text", False),
        ("s3://texts/dat", False),
        ("s3://texts/data/a.txt/b", False),
        ("s3://other", False),
    ],
)
def test_prefixes_are_of_whole_parts(prefix: str, inside: bool) -> None:
    ref = S3Ref.parse("s3://texts/data/a.txt")
    assert ref is not None
    assert ref.is_below(prefix) is inside


def test_whoever_waits_can_end_it_and_nothing_half_is_kept(s3: S3Server, tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def stop(_event: Event) -> None:
        raise Enough

    s3.put("a.txt", b"words")
    with pytest.raises(Enough):
        fetch("model", DatasetSpec(s3="s3://texts/a.txt"), Calibration(), Evaluation(), stop)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_administrator_reads_everything(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal of the private bucket is the server's."""
    s3.put("a.txt", b"words", bucket="private")
    for name, value in s3.variables(*ADMIN).items():
        monkeypatch.setenv(name, value)
    assert documents(fetched("s3://private/a.txt")) == ["words"]
    assert refused("s3://no-such-bucket/a.txt").code == "s3_object_not_found"
