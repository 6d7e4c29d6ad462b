"""The decoders that the engine knows, and the tensors that a config.json implies for them.

One table, FAMILIES: for each model type the linears of a layer, which of them read the same input, the other
tensors, and what Transformers assumes where config.json is silent. Shapes are written in the model's sizes,
by name ("q" = heads x head_dim), so a new family is one entry here. Nothing is imported from Transformers; a
test compares this module with its modeling code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compression.errors import Problem

LM_HEAD = "lm_head"


@dataclass(frozen=True)
class LinearSpec:
    """One linear of a layer. out, inp: names of sizes. bias: "always", a config key that decides, or ""."""

    name: str
    out: str
    inp: str
    bias: str = ""


@dataclass(frozen=True)
class GroupSpec:
    """Linears that read the same tensor; norm: the module whose output that is, "" where it is none.

    producer: a linear whose last output rows are multiplied into that tensor channel by channel, so that they
    can be scaled for it (v_proj for o_proj, up_proj for down_proj); "" where there is none.
    """

    linears: tuple[LinearSpec, ...]
    norm: str = ""
    producer: str = ""


Groups = tuple[GroupSpec, ...]
"""A layer's groups in forward order."""


def _attention(norm: str = "input_layernorm", *, qkv_bias: str = "", o_bias: str = "") -> Groups:
    names = (("q_proj", "q"), ("k_proj", "kv"), ("v_proj", "kv"))
    qkv = tuple(LinearSpec(f"self_attn.{name}", size, "hidden", qkv_bias) for name, size in names)
    return (
        GroupSpec(qkv, norm),
        _alone("self_attn.o_proj", "hidden", "q", o_bias, producer="self_attn.v_proj"),
    )


def _gated_mlp(norm: str = "post_attention_layernorm", *, bias: str = "") -> Groups:
    names = ("gate_proj", "up_proj")
    gate_up = tuple(LinearSpec(f"mlp.{name}", "inner", "hidden", bias) for name in names)
    return (
        GroupSpec(gate_up, norm),
        _alone("mlp.down_proj", "hidden", "inner", bias, producer="mlp.up_proj"),
    )


def _alone(name: str, out: str, inp: str, bias: str = "", norm: str = "", producer: str = "") -> GroupSpec:
    return GroupSpec((LinearSpec(name, out, inp, bias),), norm, producer)


def _parallel(attention: Groups, mlp: Groups) -> Groups:
    """Attention and MLP read one norm, side by side: their first groups are one."""
    first = GroupSpec(attention[0].linears + mlp[0].linears, attention[0].norm)
    return (first, *attention[1:], *mlp[1:])


_FUSED_MLP: Groups = (
    _alone("mlp.gate_up_proj", "gate_up", "hidden", norm="post_attention_layernorm"),
    _alone("mlp.down_proj", "hidden", "inner", producer="mlp.gate_up_proj"),
)


def _norms(*names: str, shape: tuple[str, ...] = ("hidden",)) -> dict[str, tuple[str, ...]]:
    return {f"{name}.weight": shape for name in names}


def _layer_norm(name: str) -> dict[str, tuple[str, ...]]:
    return {f"{name}.weight": ("hidden",), f"{name}.bias": ("hidden",)}


_PRE_NORMS = _norms("input_layernorm", "post_attention_layernorm")
_FOUR_NORMS = _PRE_NORMS | _norms("pre_feedforward_layernorm", "post_feedforward_layernorm")
_QK_NORMS = _norms("self_attn.q_norm", "self_attn.k_norm", shape=("head",))
_ALL_BIASED = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}


@dataclass(frozen=True)
class Family:
    """The structure of one model type.

    groups, others: of a layer, under its prefix; sizes by name. optional: others that are there when a config
    key is true. norm_offset: what norms add to their weight before they multiply with it. outside: tensors in
    no layer, lm_head apart. defaults: what Transformers assumes where config.json has no such key (without
    num_key_value_heads there are as many as heads, without head_dim it is hidden_size / heads). fixed: config
    keys that must have this value (a str names another key) for this table to hold.
    """

    architecture: str
    groups: Groups
    others: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    norm_offset: int = 0
    layers_prefix: str = "model.layers."
    embedding: str = "model.embed_tokens.weight"
    outside: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _norms("model.norm"))
    intermediate_key: str = "intermediate_size"

    def linears(self) -> list[LinearSpec]:
        """A layer's linears in forward order."""
        return [linear for group in self.groups for linear in group.linears]


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _attention(**_ALL_BIASED) + _gated_mlp(bias="mlp_bias"), _PRE_NORMS),
    "mistral": Family(
        "MistralForCausalLM", _attention() + _gated_mlp(), _PRE_NORMS, defaults={"num_key_value_heads": 8}
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _attention(qkv_bias="always") + _gated_mlp(),
        _PRE_NORMS,
        defaults={"num_key_value_heads": 32},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _attention(**_ALL_BIASED) + _gated_mlp(),
        _PRE_NORMS | _QK_NORMS,
        defaults={"num_key_value_heads": 32, "head_dim": 128},
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        _attention(**_ALL_BIASED) + _gated_mlp(),
        _PRE_NORMS,
        defaults={"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
        norm_offset=1,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _attention(**_ALL_BIASED) + _gated_mlp("pre_feedforward_layernorm"),
        _FOUR_NORMS,
        defaults={"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True},
        norm_offset=1,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _attention(**_ALL_BIASED) + _gated_mlp("pre_feedforward_layernorm"),
        _FOUR_NORMS | _QK_NORMS,
        defaults={"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True},
        norm_offset=1,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        (
            _alone("self_attn.qkv_proj", "qkv", "hidden", norm="input_layernorm"),
            _alone("self_attn.o_proj", "hidden", "q", producer="self_attn.qkv_proj"),
            *_FUSED_MLP,
        ),
        _PRE_NORMS,
    ),
    "granite": Family(
        "GraniteForCausalLM", _attention(**_ALL_BIASED) + _gated_mlp(bias="mlp_bias"), _PRE_NORMS
    ),
    "glm": Family(
        "GlmForCausalLM",
        _attention(qkv_bias="attention_bias") + _FUSED_MLP,
        _PRE_NORMS,
        defaults={"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True},
    ),
    "glm4": Family(
        "Glm4ForCausalLM",
        _attention(qkv_bias="attention_bias") + _FUSED_MLP,
        _PRE_NORMS | _norms("post_self_attn_layernorm", "post_mlp_layernorm"),
        defaults={"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        _attention("", **_ALL_BIASED) + _gated_mlp(""),
        _norms("post_attention_layernorm", "post_feedforward_layernorm")
        | _norms("self_attn.q_norm", shape=("q",))
        | _norms("self_attn.k_norm", shape=("kv",)),
    ),
    "cohere": Family(
        "CohereForCausalLM",
        _parallel(_attention(**_ALL_BIASED), _gated_mlp()),
        _norms("input_layernorm"),
        optional={
            "use_qk_norm": _norms("self_attn.q_norm", shape=("heads", "head"))
            | _norms("self_attn.k_norm", shape=("kv_heads", "head"))
        },
        defaults={"tie_word_embeddings": True},
    ),
    "cohere2": Family(
        "Cohere2ForCausalLM",
        _parallel(_attention(**_ALL_BIASED), _gated_mlp()),
        _norms("input_layernorm"),
        defaults={"tie_word_embeddings": True},
    ),
    "opt": Family(
        "OPTForCausalLM",
        (
            GroupSpec(
                tuple(LinearSpec(f"self_attn.{n}_proj", "hidden", "hidden", "enable_bias") for n in "qkv"),
                "self_attn_layer_norm",
            ),
            _alone("self_attn.out_proj", "hidden", "hidden", "enable_bias", producer="self_attn.v_proj"),
            _alone("fc1", "inner", "hidden", "enable_bias", "final_layer_norm"),
            _alone("fc2", "hidden", "inner", "enable_bias"),
        ),
        _layer_norm("self_attn_layer_norm") | _layer_norm("final_layer_norm"),
        defaults={"enable_bias": True, "tie_word_embeddings": True, "max_position_embeddings": 2048},
        fixed={
            "word_embed_proj_dim": "hidden_size",
            "do_layer_norm_before": True,
            "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False,
        },
        layers_prefix="model.decoder.layers.",
        embedding="model.decoder.embed_tokens.weight",
        outside={"model.decoder.embed_positions.weight": ("positions + 2", "hidden")}
        | _layer_norm("model.decoder.final_layer_norm"),
        intermediate_key="ffn_dim",
    ),
}
"""By `model_type`."""


@dataclass(frozen=True)
class Decoder:
    """A family with its sizes: the shapes of one model.

    sizes: by the names that the table uses. switches: the config keys that decide about biases and optional
    tensors.
    """

    family: Family
    sizes: Mapping[str, int]
    num_layers: int
    tied: bool
    switches: Mapping[str, bool]

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
        return self.sizes["inner"]

    def shape(self, linear: LinearSpec) -> tuple[int, int]:
        """(out, in)."""
        return self.sizes[linear.out], self.sizes[linear.inp]

    def layer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name within the layer -> shape: the linears in forward order, then the rest."""
        shapes: dict[str, tuple[int, ...]] = {}
        for linear in self.family.linears():
            shapes[f"{linear.name}.weight"] = self.shape(linear)
            if linear.bias == "always" or self.switches.get(linear.bias):
                shapes[f"{linear.name}.bias"] = (self.sizes[linear.out],)
        others = dict(self.family.others)
        for key, tensors in self.family.optional.items():
            others |= tensors if self.switches[key] else {}
        return shapes | self._sized(others)

    def outside_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what is in no layer. A tied lm_head is not on disk."""
        shapes = self._sized({self.family.embedding: ("vocab", "hidden"), **self.family.outside})
        if not self.tied:
            shapes[f"{LM_HEAD}.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    @property
    def parked_width(self) -> int:
        """Numbers a token that a suspended forward holds, at the group where it is most.

        Residual and normed hidden state always; before the output projection also queries, keys, values and
        their result; before the down projection also its input. A fused projection's result outlives its
        parts, as they are views of it.
        """
        outs = {linear.out for linear in self.family.linears()}
        attention = 2 * (self.sizes["q"] + self.sizes["kv"]) + (self.sizes["qkv"] if "qkv" in outs else 0)
        mlp = self.sizes["inner"] + (self.sizes["gate_up"] if "gate_up" in outs else 0)
        return 2 * self.sizes["hidden"] + max(attention, mlp)

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
    problems = _architecture_problems(config, family)
    stated = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
    hidden, inner, layers, heads, vocab = (
        _size(stated, key, None, problems)
        for key in (
            "hidden_size", family.intermediate_key, "num_hidden_layers", "num_attention_heads", "vocab_size",
        )
    )  # fmt: skip
    kv_heads = _size(stated, "num_key_value_heads", heads, problems)
    head = _size(stated, "head_dim", hidden // heads, problems)
    positions = _size(stated, "max_position_embeddings", 1, problems)
    if not problems and heads % kv_heads:
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
    }
    keys = {linear.bias for linear in family.linears()} | family.optional.keys()
    switches = {key: stated.get(key) is True for key in keys}
    return Decoder(family, sizes, layers, stated.get("tie_word_embeddings") is True, switches)


def _architecture_problems(config: Mapping[str, Any], family: Family) -> list[Problem]:
    architectures = config.get("architectures")
    if architectures is not None and architectures != [family.architecture]:
        return [
            _problem(
                "unsupported_architecture",
                f"The model is {str(architectures)[:200]}.",
                f"Of this model type only {family.architecture} is supported.",
            )
        ]
    problems = []
    for key, value in family.fixed.items():
        needed = config.get(value) if isinstance(value, str) else value
        if config.get(key) not in (None, needed):
            problems.append(
                _problem(
                    "unsupported_architecture",
                    f"config.json: {key} is {str(config[key])[:40]}.",
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
