"""The output's files: which tensors each holds, under which names, dtypes and shapes.

Sizes are exact before any compute, and files can be written in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compression.checkpoint.headers import Checkpoint
from compression.checkpoint.layout import TensorSpec
from compression.families.decoder import Decoder, LayerShape
from compression.methods import method_of
from compression.planning.plans import CachePlan, FoldPlan, LayerPlan, LinearFoldPlan, ModulePlan
from compression.schemes import Scheme
from compression.steps import SmoothingStep

MAX_OUTSIDE_SHARD_BYTES = 5_000_000_000

_SCALES: dict[str | None, str] = {"F8_E4M3": "F8_E4M3", "E8M0": "U8"}
"""How scales with a dtype of their own are stored; the others have the dtype of the source's weights."""


def stored_tensors(scheme: Scheme | None, shape: tuple[int, int], dtype: str) -> dict[str, TensorSpec]:
    """What a compressed linear [out, in] is on disk: suffix after "<name>." -> dtype and shape.

    dtype: that of the source's weight, in which scales are stored, and the weight itself without a scheme.
    """
    if scheme is None:
        return {"weight": TensorSpec(dtype, shape)}
    rows, columns = shape
    weights = scheme.weights
    scales = weights.scale_shape(shape)
    tensors = {"weight_scale": TensorSpec(_SCALES.get(weights.scale_dtype, dtype), scales)}
    if scheme.format == "pack-quantized":
        tensors["weight_packed"] = TensorSpec("I32", (rows, -(-columns * weights.num_bits // 32)))
        tensors["weight_shape"] = TensorSpec("I64", (2,))
        if not weights.symmetric:
            packed_rows = -(-rows * weights.num_bits // 32)
            tensors["weight_zero_point"] = TensorSpec("I32", (packed_rows, scales[1]))
    elif weights.num_bits == 4:
        tensors["weight_packed"] = TensorSpec("U8", (rows, columns // 2))
    else:
        tensors["weight"] = TensorSpec("I8" if weights.type == "int" else "F8_E4M3", shape)
    if weights.strategy == "tensor_group":
        tensors["weight_global_scale"] = TensorSpec("F32", (1,))
    if scheme.fixed_input is not None:
        fixed = "F32" if scheme.fixed_input == "input_global_scale" else dtype
        tensors[scheme.fixed_input] = TensorSpec(fixed, (1,))
    return tensors


def assign_shards(
    checkpoint: Checkpoint,
    decoder: Decoder,
    modules: Sequence[ModulePlan],
    beside: Sequence[str],
    smoothing: SmoothingStep | None,
    *,
    caches: bool = False,
) -> tuple[tuple[LayerPlan, ...], tuple[tuple[str, tuple[str, ...]], ...]]:
    """A file for each layer, numbered from the first; then files of at most 5 GB for all the rest.

    beside: tensors that are copied as well. smoothing: the recipe's step that folds scales, which decides
    what they are folded into. caches: keys and values get scales.
    """
    outside = [key for key in (*decoder.outside_tensors(), *beside) if key in checkpoint.tensors]
    parts = list(_parts(checkpoint, outside))
    total = decoder.num_layers + len(parts)
    names = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    by_layer: dict[int | None, list[ModulePlan]] = {}
    for module in modules:
        if module.compressed:
            by_layer.setdefault(module.layer, []).append(module)
    layers = []
    for index in range(decoder.num_layers):
        prefix = f"{decoder.layers_prefix}{index}."
        compressed = tuple(by_layer.get(index, ()))
        shape = decoder.layer(index)
        folds = _folds(decoder, prefix, shape, compressed) if smoothing else {}
        linear_folds: tuple[LinearFoldPlan, ...] = ()
        if smoothing is not None and method_of(smoothing).folds_linears:
            linear_folds = _linear_folds(decoder, prefix, shape, compressed)
        keys = {module.key for module in compressed}
        keys |= {key for fold in folds.values() for key in fold.keys}
        keys |= {key for fold in linear_folds for key in fold.keys}
        copied = tuple(prefix + name for name in shape.parameters if prefix + name not in keys)
        first = next(iter(shape.tensors))
        prefix_on_disk = checkpoint.tensors[prefix + first].name.removesuffix(first)
        cache = _cache(checkpoint, decoder, prefix) if caches else None
        layers.append(
            LayerPlan(
                index, prefix, prefix_on_disk, compressed, copied, names[index], folds, linear_folds, cache
            )
        )
    return tuple(layers), tuple(zip(names[decoder.num_layers :], parts, strict=True))


def attention_linear(decoder: Decoder) -> str | None:
    """Name in a layer of the linear that makes the keys, by itself or with the queries and values."""
    names = [linear.name for linear in decoder.family.linears()]
    return next((name for name in names if name.rpartition(".")[2] in ("k_proj", "qkv_proj")), None)


def _cache(checkpoint: Checkpoint, decoder: Decoder, prefix: str) -> CachePlan:
    linear = attention_linear(decoder)
    assert linear is not None  # the plan refuses other models
    name = prefix + linear
    return CachePlan(name.rpartition(".")[0], checkpoint.tensors[f"{name}.weight"].dtype)


def _folds(
    decoder: Decoder, prefix: str, shape: LayerShape, compressed: Sequence[ModulePlan]
) -> dict[str, FoldPlan]:
    """The norms of a layer all of whose readers are compressed, by group."""
    names = {module.name for module in compressed}
    folds = {}
    for group in shape.groups:
        if group.norm and all(prefix + linear.name in names for linear in group.linears):
            first, norm = prefix + group.linears[0].name, prefix + group.norm
            keys = tuple(
                f"{norm}.{suffix}"
                for suffix in ("weight", "bias")
                if f"{group.norm}.{suffix}" in shape.tensors
            )
            folds[first] = FoldPlan(first, norm, keys, decoder.family.norm_offset)
    return folds


def _linear_folds(
    decoder: Decoder, prefix: str, shape: LayerShape, compressed: Sequence[ModulePlan]
) -> tuple[LinearFoldPlan, ...]:
    """The linears that are compressed together with all that read their outputs channel by channel."""
    names = {module.name for module in compressed}
    folds = []
    for group in shape.groups:
        readers = [prefix + linear.name for linear in group.linears]
        linear = prefix + group.producer
        if group.producer and linear in names and names.issuperset(readers):
            bias = f"{group.producer}.bias"
            keys = (prefix + bias,) if bias in shape.tensors else ()
            rows = decoder.sizes["kv" if group.linears[0].inp == "q" else group.linears[0].inp]
            folds.append(LinearFoldPlan(readers[0], linear, keys, rows, decoder.sizes["head"]))
    return tuple(folds)


def _parts(checkpoint: Checkpoint, keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
    part: list[str] = []
    size = 0
    for key in keys:
        nbytes = checkpoint.tensors[key].nbytes
        if part and size + nbytes > MAX_OUTSIDE_SHARD_BYTES:
            yield tuple(part)
            part, size = [], 0
        part.append(key)
        size += nbytes
    yield tuple(part)


def stored_layer(checkpoint: Checkpoint, layer: LayerPlan) -> dict[str, TensorSpec]:
    """Every tensor of a layer's shard, by its name on disk: dtype and shape."""
    specs = {key: checkpoint.tensors[key].spec for key in layer.unquantized}
    for module in layer.modules:
        tensors = stored_tensors(module.scheme, module.shape, module.dtype)
        specs |= {f"{module.name}.{suffix}": spec for suffix, spec in tensors.items()}
    return layer.on_disk(specs | (layer.cache.stored() if layer.cache else {}))
