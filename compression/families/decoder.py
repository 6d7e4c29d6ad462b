"""The decoder that a config.json states: its sizes, and the tensors and linears of its layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from compression.errors import Problem
from compression.families.configuration import as_read, text_config, ties
from compression.families.families import FAMILIES
from compression.families.structure import ExpertsSpec, Family, Groups, GroupSpec, LinearSpec
from compression.families.values import value_problems

LM_HEAD = "lm_head"
MAX_EXPERTS = 4096
"""In one layer: config.json cannot make us look for any number."""
MAX_STACKED_EXPERTS = 1 << 16
"""In all layers, where few tensors stand for many experts."""


@dataclass(frozen=True)
class LayerShape:
    """What a decoder layer is made of, under its prefix.

    groups: in forward order. tensors: name on disk -> shape, the linears in forward order, then the rest.
    routers: modules that choose experts and are no linears. stacks: those tensors that hold a linear of all
    experts.
    """

    groups: Groups
    tensors: Mapping[str, tuple[int, ...]]
    routers: tuple[str, ...] = ()
    stacks: frozenset[str] = frozenset()

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of all that the layer of a model holds: as on disk, with linears in place of their stacks."""
        weights = [f"{linear.name}.weight" for group in self.groups for linear in group.linears]
        return tuple(n for n in dict.fromkeys([*self.tensors, *weights]) if n not in self.stacks)


@dataclass(frozen=True)
class SparseRule:
    """Which layers have experts: those `listed`, or from `first` on every `step`-th not in `dense`."""

    first: int
    step: int
    dense: tuple[Any, ...]
    listed: frozenset[int] | None = None

    def holds(self, index: int) -> bool:
        if self.listed is not None:
            return index in self.listed
        return index >= self.first and index not in self.dense and (index + 1) % self.step == 0


@dataclass(frozen=True)
class Decoder:
    """A family with its sizes: the shapes of one model.

    sizes: by the names that the table uses. tied: whether lm_head is the embeddings; as config.json says,
    until somebody has looked at the checkpoint. switches: the config keys that decide about biases and
    optional tensors. sparse: which layers have experts, None where none has. window: of sliding attention, 0
    without. positions: max_position_embeddings.
    """

    family: Family
    sizes: Mapping[str, int]
    num_layers: int
    tied: bool
    switches: Mapping[str, bool]
    sparse: SparseRule | None = None
    window: int = 0
    positions: int = 0

    @property
    def layers_prefix(self) -> str:
        """What stands before a layer's number in the name of a tensor."""
        return self.family.layers_prefix

    @property
    def embedding(self) -> str:
        """Name of the token embeddings' weight."""
        return self.family.embedding

    @property
    def vocab_size(self) -> int:
        return self.sizes["vocab"]

    @property
    def hidden_size(self) -> int:
        return self.sizes["hidden"]

    @property
    def intermediate_size(self) -> int:
        """The widest of an MLP's and an expert's."""
        return max(self.sizes.get(name, 0) for name in ("inner", "expert_inner", "shared_inner"))

    def shape(self, linear: LinearSpec) -> tuple[int, int]:
        """(out, in)."""
        return self.sizes[linear.out], self.sizes[linear.inp]

    def layer(self, index: int) -> LayerShape:
        """What one layer is made of."""
        return self._sparse if self.is_sparse(index) else self._dense

    def is_sparse(self, index: int) -> bool:
        """Whether a layer has experts."""
        return self.sparse is not None and self.sparse.holds(index)

    def kinds(self) -> list[tuple[LayerShape, int]]:
        """What layers are made of, and how many are made so: dense ones, and those with experts."""
        counts = Counter(map(self.is_sparse, range(self.num_layers)))
        return [(self._sparse if sparse else self._dense, count) for sparse, count in counts.items()]

    @cached_property
    def _dense(self) -> LayerShape:
        return LayerShape(self.family.groups, self._tensors(self.family.groups, self.family.others))

    @cached_property
    def _sparse(self) -> LayerShape:
        sparse = self.family.sparse
        assert sparse is not None  # or no layer is one
        groups: list[GroupSpec] = []
        for group in sparse.groups:
            groups += group.groups(self.sizes["experts"]) if isinstance(group, ExpertsSpec) else (group,)
        stacks = {name: self._stack(linears) for name, linears in sparse.experts.stacked().items()}
        single = [group for group in groups if not (stacks and group.experts)]
        tensors = self._tensors(single, sparse.others) | stacks
        linears = {linear.name for group in single for linear in group.linears}
        routers = tuple({sparse.experts.router} - linears)
        return LayerShape(tuple(groups), tensors, routers, frozenset(stacks))

    def _stack(self, linears: Sequence[LinearSpec]) -> tuple[int, ...]:
        """[experts, in, outputs side by side]."""
        shapes = [self.shape(linear) for linear in linears]
        return self.sizes["experts"], shapes[0][1], sum(out for out, _ in shapes)

    def _tensors(
        self, groups: Sequence[GroupSpec], others: Mapping[str, tuple[str, ...]]
    ) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for group in groups:
            for linear in group.linears:
                shapes[f"{linear.name}.weight"] = self.shape(linear)
                if linear.bias == "always" or self.switches.get(linear.bias):
                    shapes[f"{linear.name}.bias"] = (self.sizes[linear.out],)
        others = dict(others)
        for key, tensors in self.family.optional.items():
            others |= tensors if self.switches[key] else {}
        return shapes | self._sized(others)

    def outside_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what is in no layer. A tied lm_head is not on disk."""
        shapes = self._sized({self.family.embedding: ("vocab", "hidden"), **self.family.outside})
        if not self.tied:
            shapes[f"{LM_HEAD}.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def parked_width(self, group: GroupSpec) -> int:
        """Numbers a token that a forward holds which is suspended before a group.

        The embedding's output, which the model's frame keeps, and the layer's input always; in attention also
        the normed input, before the output projection queries, keys, values and their result; after attention
        the new residual, normed and not, before the down projection also its input. A fused projection's
        result outlives its parts, as they are views of it.
        """
        sizes = self.sizes
        hidden, inp = sizes["hidden"], group.linears[0].inp
        outs = {linear.out for linear in self.family.linears()}
        beside_experts = hidden if "shared_inner" in sizes else 0  # a shared expert's result, or theirs
        if group.experts:
            return 4 * hidden + beside_experts
        if inp == "shared_inner":
            return 4 * hidden + beside_experts + sizes["shared_inner"]
        if inp == "inner":
            return 4 * hidden + sizes["inner"] + (sizes["gate_up"] if "gate_up" in outs else 0)
        if inp == "hidden":
            return 4 * hidden
        if "kv_b" in outs:  # of which values are views, as one part of the queries is of theirs
            return 3 * hidden + 3 * sizes["q"] + sizes["kv_b"] + sizes["kv_a"] + sizes["attended"]
        return 3 * hidden + 2 * (sizes["q"] + sizes["kv"]) + (sizes["qkv"] if "qkv" in outs else 0)

    def _sized(self, shapes: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self.sizes[size] for size in shape) for name, shape in shapes.items()}


def read_decoder(config: Mapping[str, Any]) -> Decoder | list[Problem]:
    """The decoder that a config.json of a known family states, or every reason why it cannot be used."""
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        return [
            _problem(
                "unsupported_architecture",
                f"Models of type {str(model_type)[:100]!r} are not supported.",
                f"Supported model types: {', '.join(FAMILIES)}.",
            )
        ]
    problems = _meaning_nulls(text_config(config, family), family)
    config = as_read(config, family)
    text = text_config(config, family)
    problems += _architecture_problems(config, text, family)
    present = {family.aliases.get(key, key): value for key, value in text.items() if value is not None}
    stated = {**family.defaults, **present}
    hidden, inner, layers, heads, vocab = (
        _size(stated, key, None, problems)
        for key in (
            "hidden_size", family.intermediate_key, "num_hidden_layers", "num_attention_heads", "vocab_size",
        )
    )  # fmt: skip
    kv_heads = _size(stated, "num_key_value_heads", heads, problems)
    head = _size(stated, "head_dim", hidden // heads, problems)
    positions = _size(stated, "max_position_embeddings", None, problems)
    if not problems and heads % kv_heads and "kv_lora" not in family.sizes:
        problems.append(
            _problem(
                "config_invalid",
                f"config.json: {heads} attention heads are not a multiple of {kv_heads} key/value heads.",
            )
        )
    if problems:
        return problems
    sizes = {
        "hidden": hidden,
        "inner": inner,
        "gate_up": 2 * inner,
        "heads": heads,
        "kv_heads": kv_heads,
        "head": head,
        "q": heads * head,
        "kv": kv_heads * head,
        "qkv": (heads + 2 * kv_heads) * head,
        "vocab": vocab,
        "positions + 2": positions + 2,
        "one": 1,
    }
    sizes |= {
        name: sum(prod(_size(stated, key, None, problems) for key in product) for product in products)
        for name, products in family.sizes.items()
    }
    if sizes.get("experts", 1) > MAX_EXPERTS:
        problems.append(_problem("config_invalid", f"config.json: more than {MAX_EXPERTS} experts a layer."))
    stacked = family.sparse is not None and bool(family.sparse.experts.stacks)
    if stacked and layers * sizes["experts"] > MAX_STACKED_EXPERTS:
        problems.append(_problem("config_invalid", f"config.json: more than {MAX_STACKED_EXPERTS} experts."))
    sparse = _sparse_rule(stated, family, problems)
    problems += value_problems(config, text, family, vocab, sizes["head"])
    if problems:
        return problems
    keys = {linear.bias for linear in family.linears()} | family.optional.keys()
    switches = {key: stated.get(key) is True for key in keys}
    window = _window(text, stated)
    return Decoder(family, sizes, layers, ties(config, family), switches, sparse, window, positions)


def _window(text: Mapping[str, Any], stated: Mapping[str, Any]) -> int:
    """Of sliding attention: null in config.json means that there is none, whatever the default."""
    window = None if text.get("sliding_window", 0) is None else stated.get("sliding_window")
    return window if type(window) is int and stated.get("use_sliding_window", True) else 0


def _meaning_nulls(text: Mapping[str, Any], family: Family) -> list[Problem]:
    """A null that makes another structure of the model than the table has."""
    if "q_lora_rank" not in family.defaults or text.get("q_lora_rank", 0) is not None:
        return []
    return [
        _problem(
            "unsupported_architecture",
            "config.json: q_lora_rank is null, so that queries are made by one linear.",
            "Models of this type are supported with a q_lora_rank only.",
        )
    ]


def _sparse_rule(stated: Mapping[str, Any], family: Family, problems: list[Problem]) -> SparseRule | None:
    """Where the experts are, by the config keys that the family goes by."""
    if family.sparse is None:
        return None
    told = {key: stated[key] for key in family.sparse.dense if key in stated}
    first, step = told.get("first_k_dense_replace", 0), told.get("decoder_sparse_step", 1)
    dense, listed = told.get("mlp_only_layers", []), told.get("moe_layers")
    numbers = [first, step, *(listed if isinstance(listed, list) else ())]
    lists = isinstance(dense, list) and isinstance(listed, list | None)
    if not lists or any(type(number) is not int for number in numbers) or step < 1:
        keys = ", ".join(family.sparse.dense)
        message = f"config.json: {keys} do not say which layers have experts."
        problems.append(_problem("config_invalid", message))
        return None
    return SparseRule(first, step, tuple(dense), None if listed is None else frozenset(listed))


def _architecture_problems(
    config: Mapping[str, Any], text: Mapping[str, Any], family: Family
) -> list[Problem]:
    architectures = config.get("architectures")
    if architectures is not None and architectures != [family.architecture]:
        return [
            _problem(
                "unsupported_architecture",
                f"The model is {str(architectures)[:200]}.",
                f"Of this model type only {family.architecture} is supported.",
            )
        ]
    text_type = text.get("model_type")
    if family.vision.text_type and text_type not in (None, config["model_type"], family.vision.text_type):
        return [
            _problem(
                "unsupported_architecture",
                f"config.json: the model_type of text_config is {str(text_type)[:40]}.",
                f"Of {family.architecture} only those with {family.vision.text_type} are supported.",
            )
        ]
    problems = []
    for key, value in family.fixed.items():
        needed = text.get(value) if isinstance(value, str) else value
        if text.get(key) not in (None, needed):
            problems.append(
                _problem(
                    "unsupported_architecture",
                    f"config.json: {key} is {str(text[key])[:40]}.",
                    f"Models of this type are supported with {key} = {needed} only.",
                )
            )
    return problems


def _size(stated: Mapping[str, Any], key: str, default: int | None, problems: list[Problem]) -> int:
    value = stated.get(key, default)
    if type(value) is int and 0 < value < 2**31:
        return value
    problems.append(
        _problem("config_invalid", f"config.json: {key} is {str(value)[:40]}, not a positive number.")
    )
    return 1


def _problem(code: str, message: str, hint: str = "") -> Problem:
    return Problem(code, message, hint, "/model")
