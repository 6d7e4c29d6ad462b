"""Whatever strangers' files hold, only CompressionErrors come out, and none says that nobody foresaw it.

Inputs are real ones of which something was replaced: pure noise never gets past the first check.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compression import Recipe, plan
from compression.boundary import MAX_JSON_DEPTH, parse_json
from compression.data.calibration import load_blocks
from compression.data.documents import open_documents
from compression.errors import CompressionError, UnexpectedError
from compression.hub.selection import wanted_files
from compression.peer_recipe import load_recipe_yaml
from compression.recipe import Calibration, DatasetSpec, Evaluation
from compression.run.journal import Journal
from tests.support.models import CHAT_TEMPLATE

SMALL = Calibration(num_calibration_samples=2, max_seq_length=16)
NONE = Evaluation(enabled=False)

many = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
few = settings(many, max_examples=40)

pieces = st.characters() | st.sampled_from(("\ud83d", "\udc00", "\0", "\n", "\u2028", " ", "{", "%"))
text = st.lists(pieces, max_size=12).map("".join)  # st.text has no half characters
leaf = (
    st.none()
    | st.booleans()
    | st.integers(-2, 1 << 70)
    | st.floats(allow_nan=True)
    | text
    | st.sampled_from(["Linear", "re:.*", "re:(", "lm_head", "W4A16", "minmax", "oneshot", "2:4"])
)
json_value = st.recursive(
    leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=8
) | st.just(json.loads("[" * (MAX_JSON_DEPTH - 10) + "]" * (MAX_JSON_DEPTH - 10)))


@contextmanager
def only_ours(*others: type[Exception]) -> Iterator[None]:
    """Nothing is raised, or a CompressionError that somebody foresaw, whose words can be stored."""
    caught = None
    try:
        yield
    except UnexpectedError:
        raise
    except CompressionError as error:
        caught = error
    except others:
        pass
    if caught is not None:
        assert caught.code
        assert caught.message
        str(caught).encode()


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, by the keys that lead there."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths_of(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The value with another one at one place."""
    if not path:
        return new
    copy = deepcopy(value)
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return copy


@st.composite
def damaged(draw: st.DrawFn, whole: Any, changes: int = 2) -> Any:
    """A value with some of its places replaced by anything."""
    for _ in range(draw(st.integers(1, changes))):
        place = draw(st.sampled_from(sorted(paths_of(whole), key=str)))
        whole = replaced(whole, place, draw(json_value))
    return whole


ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "id": 3}


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "model"
    shutil.copytree(tiny_llama, folder)
    return folder


def use(folder: Path, path: Path) -> None:
    load_blocks(DatasetSpec(path=str(path)), folder, SMALL, NONE)


@many
@given(
    rows=st.lists(damaged(ROW) | damaged({"text": "word " * 40}), min_size=1, max_size=4)
    | st.lists(st.builds(lambda end: {"text": "word " * 40 + end}, text), min_size=1, max_size=2)
    | st.lists(st.builds(lambda end: {**ROW, "messages": [{"role": "user", "content": end}]}, json_value))
)
def test_rows(folder: Path, tmp_path: Path, rows: list[Any]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    with only_ours():
        use(folder, path)


@many
@given(
    suffix=st.sampled_from([".jsonl", ".csv", ".txt", ".parquet"]),
    begin=st.sampled_from([b"", b"text\n", b'{"text": "', b"PAR1", b"\xef\xbb\xbf", b'a,text\n"']),
    noise=st.binary(max_size=60) | text.map(lambda value: value.encode("utf-8", "surrogatepass")),
)
def test_bytes(folder: Path, tmp_path: Path, suffix: str, begin: bytes, noise: bytes) -> None:
    path = tmp_path / f"noise{suffix}"
    path.write_bytes(begin + noise)
    with only_ours():
        use(folder, path)


@few
@given(place=st.integers(0, 10_000), noise=st.binary(min_size=1, max_size=8))
def test_a_damaged_table(folder: Path, tmp_path: Path, place: int, noise: bytes) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    path = tmp_path / "table.parquet"
    parquet.write_table(arrow.table({"text": ["word " * 40] * 30}), path)
    whole = bytearray(path.read_bytes())
    place %= len(whole)
    whole[place : place + len(noise)] = noise
    path.write_bytes(whole)
    with only_ours():
        use(folder, path)


TEMPLATE_PARTS = (
    "{{ messages }}", "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ 1 / 0 }}", "{%",
    "{{ m.content.a.b }}", "{{ messages | nothing }}", "{{ raise_exception('no') }}", "{{ [] + 1 }}",
    "{{ messages[9].role }}", "{{ range(10 ** 9) | list }}", "{{ 'x'.format.__globals__ }}", "\n",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages | tojson }}", "\ud83d", "{% break %}",
)  # fmt: skip


@many
@given(template=st.lists(st.sampled_from(TEMPLATE_PARTS), max_size=5).map("".join))
def test_templates(folder: Path, tmp_path: Path, template: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    chat = folder / "chat_template.jinja"
    chat.write_bytes(template.encode("utf-8", "surrogatepass"))
    try:
        with only_ours():
            use(folder, path)
    finally:
        chat.write_text(CHAT_TEMPLATE)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_files_of_a_model(folder: Path, tmp_path: Path, name: str) -> None:
    path = folder / name
    whole = path.read_bytes()
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "word " * 100}) + "\n")
    document = json.loads(whole)
    if name == "tokenizer.json":  # its vocabulary is most of it, and all alike
        document["model"]["vocab"] = dict(list(document["model"]["vocab"].items())[:4])

    @few
    @given(hostile=damaged(document, changes=1))
    def check(hostile: Any) -> None:
        path.write_text(json.dumps(hostile))
        with only_ours():
            if name == "config.json":
                plan(folder, Recipe.model_validate([{"type": "rtn", "scheme": "W8A16"}]))
            else:
                use(folder, texts)

    try:
        check()
    finally:
        path.write_bytes(whole)


RECIPES: list[Any] = [
    {"steps": [{"type": "gptq", "scheme": "W4A16", "targets": ["Linear"], "ignore": ["lm_head"]}]},
    {"steps": [{"type": "sparsegpt", "mask_structure": "2:4"}], "strict": True},
    {"steps": [{"type": "awq", "scheme": "W4A16"}]},
    {
        "a_stage": {
            "run_type": "oneshot",
            "b_modifiers": {
                "SmoothQuantModifier": {"mappings": [[["re:.*q_proj"], "re:.*input_layernorm"]]},
                "SparseGPTModifier": {"sparsity": 0.5, "targets": [r"re:.*layers\.\d+$"]},
                "QuantizationModifier": {
                    "observer": {"weights": "mse"},
                    "kv_cache_scheme": {"num_bits": 8, "type": "float", "observer_kwargs": {}},
                    "config_groups": {
                        "g": {
                            "targets": ["Linear"],
                            "weights": {"num_bits": 4, "group_size": 128, "block_structure": None},
                            "input_activations": {"num_bits": 8, "dynamic": True, "strategy": "token"},
                        }
                    },
                },
            },
        }
    },
]  # fmt: skip


@many
@given(recipe=st.sampled_from(RECIPES).flatmap(damaged))
def test_recipes(recipe: Any) -> None:
    with only_ours(ValidationError):
        Recipe.model_validate(recipe)


YAML_PARTS = (
    "a: ", "- ", "\n", "  ", "[", "{", "}", "2021-99-99", "!!python/tuple ",
    "!!python/object/apply:os.system ", "!!python/object/apply:llmcompressor.sentinel.Sentinel ", "&x ",
    "*x", "? ", ": ", "0x", "1e", "<<: ", "!!binary ", "!!set ", "!!timestamp ", "\ud83d", "\0", '"',
    "[" * 400, "- " * 300, "190:20:30",
)  # fmt: skip


@few
@example(written="a: 2021-99-99")
@example(written="[" * 400)
@given(written=st.lists(st.sampled_from(YAML_PARTS), max_size=8).map("".join))
def test_yaml(written: str) -> None:
    with only_ours(ValidationError, yaml.YAMLError):
        Recipe.model_validate(load_recipe_yaml(written))


@many
@given(index=damaged({"weight_map": {"a.weight": "model-1.safetensors"}}))
def test_an_index_of_the_hub(index: Any) -> None:
    from compression.s3.models import S3File

    files = {name: S3File(name, 1, "") for name in ("config.json", "model.safetensors.index.json")}
    with only_ours():
        wanted_files("someone/model", files, lambda: json.dumps(index).encode())


@few
@given(
    lines=st.lists(
        damaged({"type": "plan", "work_key": "x"})
        | damaged({"type": "layer", "layer": 0, "file": "a", "report": {}}),
        max_size=3,
    ),
    noise=st.binary(max_size=20),
)  # fmt: skip
def test_a_journal(tmp_path: Path, lines: list[Any], noise: bytes) -> None:
    path = tmp_path / "out.partial" / ".bitmill" / "journal.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines) + noise + b"\n")
    with only_ours():
        Journal.open(tmp_path / "out")


def test_what_is_written_of_the_most_nested_row(tmp_path: Path) -> None:
    """As deep as a row may be, nothing that is done with it afterwards is too deep."""
    row = "[" * (MAX_JSON_DEPTH - 3) + "]" * (MAX_JSON_DEPTH - 3)
    path = tmp_path / "deep.jsonl"
    path.write_text(f'{{"messages": [{{"role": "user", "content": {row}}}]}}\n')
    (document,) = open_documents(DatasetSpec(path=str(path)))
    assert parse_json(json.dumps(document)) == document
