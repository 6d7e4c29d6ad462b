"""What the layers of many families are made of: attention, MLPs, experts that see every token, and norms.

Shapes are written in the model's sizes, by name: see `compression.families.structure`.
"""

from __future__ import annotations

from compression.families.structure import Groups, GroupSpec, LinearSpec


def attention(norm: str = "input_layernorm", *, qkv_bias: str = "", o_bias: str = "") -> Groups:
    """Query, key and value projections that read one norm, and the projection of their result."""
    names = (("q_proj", "q"), ("k_proj", "kv"), ("v_proj", "kv"))
    qkv = tuple(LinearSpec(f"self_attn.{name}", size, "hidden", qkv_bias) for name, size in names)
    return (
        GroupSpec(qkv, norm),
        alone("self_attn.o_proj", "hidden", "q", o_bias, producer="self_attn.v_proj"),
    )


def gated_mlp(norm: str = "post_attention_layernorm", *, bias: str = "", name: str = "mlp") -> Groups:
    """down(act(gate(x)) * up(x))."""
    leaves = ("gate_proj", "up_proj")
    gate_up = tuple(LinearSpec(f"{name}.{leaf}", "inner", "hidden", bias) for leaf in leaves)
    return (
        GroupSpec(gate_up, norm),
        alone(f"{name}.down_proj", "hidden", "inner", bias, producer=f"{name}.up_proj"),
    )


def alone(name: str, out: str, inp: str, bias: str = "", norm: str = "", producer: str = "") -> GroupSpec:
    """A linear that shares its input with no other."""
    return GroupSpec((LinearSpec(name, out, inp, bias),), norm, producer)


def parallel(attention: Groups, mlp: Groups) -> Groups:
    """Attention and MLP read one norm, side by side: their first groups are one."""
    first = GroupSpec(attention[0].linears + mlp[0].linears, attention[0].norm)
    return (first, *attention[1:], *mlp[1:])


FUSED_MLP: Groups = (
    alone("mlp.gate_up_proj", "gate_up", "hidden", norm="post_attention_layernorm"),
    alone("mlp.down_proj", "hidden", "inner", producer="mlp.gate_up_proj"),
)


def norms(*names: str, shape: tuple[str, ...] = ("hidden",)) -> dict[str, tuple[str, ...]]:
    """Weights of norms, each of the named shape."""
    return {f"{name}.weight": shape for name in names}


def layer_norm(name: str) -> dict[str, tuple[str, ...]]:
    """A norm with a bias."""
    return {f"{name}.weight": ("hidden",), f"{name}.bias": ("hidden",)}


PRE_NORMS = norms("input_layernorm", "post_attention_layernorm")
FOUR_NORMS = PRE_NORMS | norms("pre_feedforward_layernorm", "post_feedforward_layernorm")
QK_NORMS = norms("self_attn.q_norm", "self_attn.k_norm", shape=("head",))
ALL_BIASED = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}


def router(name: str) -> dict[str, tuple[str, ...]]:
    """What chooses among the experts of a layer; no linear."""
    return {f"{name}.weight": ("experts", "hidden")}


def shared_expert(name: str, gate: str = "", gate_out: str = "one") -> Groups:
    """An expert that sees every token, and a gate that reads the same, where there is one."""
    gate_up = tuple(
        LinearSpec(f"{name}.{leaf}", "shared_inner", "hidden") for leaf in ("gate_proj", "up_proj")
    )
    gates = (LinearSpec(gate, gate_out, "hidden", gate=True),) if gate else ()
    return (GroupSpec(gate_up + gates), alone(f"{name}.down_proj", "hidden", "shared_inner"))


LATENT_ATTENTION: Groups = (
    GroupSpec(
        (
            LinearSpec("self_attn.q_a_proj", "q_lora", "hidden", "attention_bias"),
            LinearSpec("self_attn.kv_a_proj_with_mqa", "kv_a", "hidden", "attention_bias"),
        ),
        "input_layernorm",
    ),
    alone("self_attn.q_b_proj", "q", "q_lora", norm="self_attn.q_a_layernorm"),
    alone("self_attn.kv_b_proj", "kv_b", "kv_lora"),  # reads a view of its norm's output
    alone("self_attn.o_proj", "hidden", "attended", "attention_bias"),
)
LATENT_SIZES = {
    "q": (("num_attention_heads", "qk_nope_head_dim"), ("num_attention_heads", "qk_rope_head_dim")),
    "q_lora": (("q_lora_rank",),),
    "kv_lora": (("kv_lora_rank",),),
    "kv_a": (("kv_lora_rank",), ("qk_rope_head_dim",)),
    "kv_b": (("num_attention_heads", "qk_nope_head_dim"), ("num_attention_heads", "v_head_dim")),
    "attended": (("num_attention_heads", "v_head_dim"),),
    "head": (("qk_rope_head_dim",),),
}
LATENT_NORMS = (
    PRE_NORMS
    | norms("self_attn.q_a_layernorm", shape=("q_lora",))
    | norms("self_attn.kv_a_layernorm", shape=("kv_lora",))
)
