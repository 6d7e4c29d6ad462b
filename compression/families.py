"""The decoders that the engine knows, and the tensors that a config.json implies for them.

One table of suffixes says which tensors of a layer are linears and which of those read the same input.
Nothing is imported from Transformers; a test compares this module with its modeling code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compression.errors import Problem

LINEAR_GROUPS: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Linears of a layer in forward order; those in one tuple read the same tensor, and vLLM fuses them."""

LAYERS_PREFIX = "model.layers."
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head"


@dataclass(frozen=True)
class Family:
    """What Transformers assumes where config.json is silent, and what differs in the modules.

    kv_heads, head_dim: defaults; None = as many as heads, and hidden_size / heads. qkv_bias: always there.
    reads_attention_bias, reads_mlp_bias: config.json's `attention_bias` (q, k, v, o) and `mlp_bias` decide.
    """

    architecture: str
    kv_heads: int | None = None
    head_dim: int | None = None
    qkv_bias: bool = False
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False
    qk_norm: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", reads_attention_bias=True, reads_mlp_bias=True),
    "mistral": Family("MistralForCausalLM", kv_heads=8),
    "qwen2": Family("Qwen2ForCausalLM", kv_heads=32, qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", kv_heads=32, head_dim=128, reads_attention_bias=True, qk_norm=True),
}
"""By `model_type`."""


@dataclass(frozen=True)
class Decoder:
    """Sizes of one model. attention_width = heads x head_dim, kv_width = key/value heads x head_dim."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    attention_width: int
    kv_width: int
    head_dim: int
    vocab_size: int
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool

    def layer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name within the layer -> shape, in forward order."""
        hidden, inner, q, kv = self.hidden_size, self.intermediate_size, self.attention_width, self.kv_width
        linears = {
            "self_attn.q_proj": (q, hidden, self.qkv_bias),
            "self_attn.k_proj": (kv, hidden, self.qkv_bias),
            "self_attn.v_proj": (kv, hidden, self.qkv_bias),
            "self_attn.o_proj": (hidden, q, self.o_bias),
            "mlp.gate_proj": (inner, hidden, self.mlp_bias),
            "mlp.up_proj": (inner, hidden, self.mlp_bias),
            "mlp.down_proj": (hidden, inner, self.mlp_bias),
        }
        shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
        for name, (rows, columns, bias) in linears.items():
            if name == "mlp.gate_proj":
                shapes["post_attention_layernorm.weight"] = (hidden,)
            shapes[f"{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{name}.bias"] = (rows,)
        if self.qk_norm:
            shapes |= {
                "self_attn.q_norm.weight": (self.head_dim,),
                "self_attn.k_norm.weight": (self.head_dim,),
            }
        return shapes

    def outside_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what is in no layer. A tied lm_head is not on disk."""
        shapes: dict[str, tuple[int, ...]] = {
            EMBEDDING: (self.vocab_size, self.hidden_size),
            FINAL_NORM: (self.hidden_size,),
        }
        if not self.tied:
            shapes[f"{LM_HEAD}.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    @property
    def parked_width(self) -> int:
        """Numbers a token that a suspended forward holds, at the group where it is most.

        Residual and normed hidden state always; before o_proj also queries, keys, values and their result;
        before down_proj also its input (STREAMING: hidden state, residual, one intermediate).
        """
        attention = 2 * self.attention_width + 2 * self.kv_width
        return 2 * self.hidden_size + max(attention, self.intermediate_size)


def read_decoder(config: dict[str, Any]) -> Decoder | list[Problem]:
    """The sizes that a config.json of a known family states, or every reason why it cannot be used."""
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
    sizes = {}
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        sizes[key] = _size(config, key, None, problems)
    heads = sizes["num_attention_heads"]
    kv_heads = _size(config, "num_key_value_heads", family.kv_heads or heads, problems)
    head_dim = _size(config, "head_dim", family.head_dim or sizes["hidden_size"] // heads, problems)
    if not problems and heads % kv_heads:
        problems.append(
            _problem(
                "config_invalid",
                f"config.json: {heads} attention heads are not a multiple of {kv_heads} key/value heads.",
            )
        )
    if problems:
        return problems
    attention_bias = family.reads_attention_bias and config.get("attention_bias") is True
    return Decoder(
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        attention_width=heads * head_dim,
        kv_width=kv_heads * head_dim,
        head_dim=head_dim,
        vocab_size=sizes["vocab_size"],
        tied=config.get("tie_word_embeddings") is True,
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family.reads_mlp_bias and config.get("mlp_bias") is True,
        qk_norm=family.qk_norm,
    )


def _architecture_problems(config: dict[str, Any], family: Family) -> list[Problem]:
    architectures = config.get("architectures")
    if architectures is None or architectures == [family.architecture]:
        return []
    return [
        _problem(
            "unsupported_architecture",
            f"The model is {str(architectures)[:200]}.",
            f"Of this model type only {family.architecture} is supported.",
        )
    ]


def _size(config: dict[str, Any], key: str, default: int | None, problems: list[Problem]) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is int and 0 < value < 2**31:
        return value
    problems.append(
        _problem("config_invalid", f"config.json: {key} is {str(value)[:40]}, not a positive number.")
    )
    return 1


def _problem(code: str, message: str, hint: str = "") -> Problem:
    return Problem(code, message, hint, "/model")
