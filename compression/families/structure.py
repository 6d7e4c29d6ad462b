"""How a decoder is described: its linears, which of them read one tensor, where its experts are.

Shapes are named ("q" = heads x head_dim) and decoder.py puts numbers to the names; families.py is the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from compression.families.native_values import ROPE_TYPES


@dataclass(frozen=True)
class LinearSpec:
    """One linear of a layer. out, inp: names of sizes. bias: "always", a config key that decides, or "".

    gate: whether it weighs what another linear makes; gates are never compressed.
    """

    name: str
    out: str
    inp: str
    bias: str = ""
    gate: bool = False


@dataclass(frozen=True)
class GroupSpec:
    """Linears that read the same tensor.

    norm: the module whose output that is, "" where it is none, or where others read it as well. producer: a
    linear whose last output rows are multiplied into that tensor channel by channel, so that they can be
    scaled for it (v_proj for o_proj, up_proj for down_proj); "" where there is none. experts: the module of
    which they are one expert, "" where they are none.
    """

    linears: tuple[LinearSpec, ...]
    norm: str = ""
    producer: str = ""
    experts: str = ""


Groups = tuple[GroupSpec, ...]
"""A layer's groups in forward order."""


@dataclass(frozen=True)
class ExpertsSpec:
    """The experts of a layer: modules "0", "1", ... of the module `name`, as many as the size "experts".

    router: the module that chooses among them. gate_up: an expert's linears that read the tokens routed to
    it, in the order gate, up. down: its linear that reads act(gate) * up. stacks: on disk, the
    tensor [experts, in, outputs] of gate and up, and that of down, of all; () where each linear has its own.
    scales_inputs: whether the router's scores scale what experts read, and not what they make.
    """

    name: str
    router: str
    gate_up: tuple[str, str] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    stacks: tuple[str, ...] = ()
    scales_inputs: bool = False

    @property
    def stages(self) -> tuple[tuple[LinearSpec, ...], ...]:
        """Linears of one expert that read one tensor: gate and up, then down."""
        gate_up = tuple(LinearSpec(name, "expert_inner", "hidden") for name in self.gate_up)
        return gate_up, (LinearSpec(self.down, "hidden", "expert_inner"),)

    def stacked(self) -> dict[str, tuple[LinearSpec, ...]]:
        """Name of each stack -> the linears of an expert that lie side by side in it."""
        stacks = zip(self.stacks, self.stages, strict=False)  # without stacks there are none
        return {f"{self.name}.{stack}": linears for stack, linears in stacks}

    def groups(self, count: int) -> Groups:
        """The experts one by one, all of the first stage before all of the second: none waits for another."""
        return tuple(
            GroupSpec(
                tuple(replace(linear, name=f"{self.name}.{expert}.{linear.name}") for linear in stage),
                experts=self.name,
            )
            for stage in self.stages
            for expert in range(count)
        )


@dataclass(frozen=True)
class Sparse:
    """The layers of a family that have experts in place of the MLP.

    groups, others: as in Family, of such a layer. dense: the config keys that say which layers are no such
    layers: first_k_dense_replace, mlp_only_layers, decoder_sparse_step; or which are, moe_layers.
    """

    groups: tuple[GroupSpec | ExpertsSpec, ...]
    others: Mapping[str, tuple[str, ...]]
    dense: tuple[str, ...] = ()

    @property
    def experts(self) -> ExpertsSpec:
        return next(group for group in self.groups if isinstance(group, ExpertsSpec))


@dataclass(frozen=True)
class Vision:
    """What stands beside a decoder that also reads images: copied, never compressed. Nothing by default.

    modules: what the names of its tensors begin with. renamed: what names on disk begin with -> what the same
    names begin with in Transformers, for checkpoints that are written as before Transformers 5; the first
    that fits counts. text_type: model_type of the decoder.
    """

    text_type: str = ""
    modules: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)

    def in_model(self, name: str) -> str:
        """What Transformers calls a tensor that is called `name` on disk."""
        for stored, own in self.renamed.items():
            if name.startswith(stored):
                return own + name.removeprefix(stored)
        return name


@dataclass(frozen=True)
class Family:
    """The structure of one model type.

    groups, others: of a layer, under its prefix; sizes by name. optional: others that are there when a config
    key is true. sparse: the layers that have experts, where there are any. norm_offset: what norms add to
    their weight before they multiply with it. outside: tensors in no layer, lm_head apart. sizes: further
    sizes, each a sum of products of config keys. aliases: config keys under another name. defaults: what
    Transformers assumes where config.json has no such key (without num_key_value_heads there are as many as
    heads, without head_dim it is hidden_size / heads). fixed: config keys that must have this value (a str
    names another key) for this table to hold. eager: attention scores are kept whole, as no fused kernel caps
    them. counts_positions: its forward counts positions by a cumsum of floating point, for which CUDA has no
    deterministic kernel, so it has to be given them. vision: what stands beside the decoder, where it reads
    images; its sizes are then those of text_config, and all names those of Transformers, whatever they are on
    disk. activation_key: the config key that names the activation function. rope_types: the kinds of rotary
    embedding that Transformers has for it, () where there is none. rope_aliases: names that they
    had before.
    """

    architecture: str
    groups: Groups
    others: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    sparse: Sparse | None = None
    sizes: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    norm_offset: int = 0
    layers_prefix: str = "model.layers."
    embedding: str = "model.embed_tokens.weight"
    outside: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"model.norm.weight": ("hidden",)})
    intermediate_key: str = "intermediate_size"
    eager: bool = False
    counts_positions: bool = False
    vision: Vision = Vision()
    activation_key: str = "hidden_act"
    rope_types: tuple[str, ...] = tuple(ROPE_TYPES)
    rope_aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def learned_positions(self) -> bool:
        """Whether positions have embeddings, so that there is none beyond the last."""
        return any("positions + 2" in shape for shape in self.outside.values())

    def linears(self) -> list[LinearSpec]:
        """A dense layer's linears in forward order."""
        return [linear for group in self.groups for linear in group.linears]
