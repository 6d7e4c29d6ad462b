"""config.json["quantization_config"]: what tells readers how a checkpoint is quantized."""

from __future__ import annotations

import re
from typing import Any

import compressed_tensors

from compression.checkpoint.formats import SCALE_DTYPES
from compression.checkpoint.reader import same_data
from compression.checkpoint.stated import in_bfloat16
from compression.families.configuration import ties, with_ties
from compression.families.decoder import LM_HEAD
from compression.families.families import FAMILIES
from compression.planning.plans import ModulePlan, Plan
from compression.schemes import KV_CACHE, QuantizationArgs, Scheme
from compression.steps import QuantizingStep


def quantization_config(plan: Plan) -> dict[str, Any] | None:
    """config.json["quantization_config"], key by key what LLM Compressor 0.14 writes for the same choice.

    One config group per distinct scheme, in the order of the layers. A single one targets the class Linear,
    and `ignore` names the linears left alone; with several, each group names its modules, and all experts of
    a layer by one expression, by which Transformers finds their scheme. None where nothing is quantized.
    """
    modules: dict[tuple[Scheme, int], dict[str, None]] = {}
    for layer in plan.layers:
        for module in layer.modules:
            if module.scheme is not None and module.step is not None:
                modules.setdefault((module.scheme, module.step), {})[_target(module, plan)] = None
    if not modules:
        return None
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if len(modules) == 1 else list(names),
            "weights": _weights_dict(scheme.weights, plan.recipe.quantizing[step]),
            "input_activations": _activations_dict(scheme.input_activations),
            "output_activations": None,
            "format": scheme.format,
        }
        for index, ((scheme, step), names) in enumerate(modules.items())
    }
    formats = {scheme.format for scheme, _ in modules}
    return {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": list(plan.ignore),
        "kv_cache_scheme": None if plan.recipe.kv_cache_step is None else _args_dict(KV_CACHE),
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": compressed_tensors.__version__,
    }


def written_config(plan: Plan) -> dict[str, Any]:
    """config.json: that of the source, with how it is quantized; in bfloat16 where readers know no other."""
    config = _with_lm_head(plan)
    quantization = quantization_config(plan)
    if quantization is None:
        return config
    schemes = (module.scheme for layer in plan.layers for module in layer.modules)
    if any(scheme.read_in_bfloat16 for scheme in schemes if scheme):
        config = in_bfloat16(config)
    return {**config, "quantization_config": quantization}


def _target(module: ModulePlan, plan: Plan) -> str:
    """What stands for a module in a config group: its name, or an expression for all experts of its layer.

    Of several groups, Transformers reads experts by the first with an expression that has "experts" in it.
    Readers name what stands before the layers differently.
    """
    if not module.experts:
        return module.name
    return rf"re:.*layers\.{re.escape(module.experts.removeprefix(plan.layers_prefix))}\..*"


_OBSERVER_NAMES = {"minmax": "memoryless_minmax", "mse": "memoryless_mse", "imatrix": "imatrix_mse"}
"""Our observers under the library's names. It has none for gram; readers do not use the field."""


def _weights_dict(args: QuantizationArgs, step: QuantizingStep) -> dict[str, Any]:
    observer = _OBSERVER_NAMES.get(step.observer or "")
    return _args_dict(args, observer, step.options.get("actorder"))


def _activations_dict(args: QuantizationArgs | None) -> dict[str, Any] | None:
    if args is None:
        return None
    return _args_dict(args, None if args.dynamic is True else "static_minmax")


def _args_dict(
    args: QuantizationArgs, observer: str | None = None, actorder: str | None = None
) -> dict[str, Any]:
    """One kind of tensor in the config."""
    return {
        "num_bits": args.num_bits,
        "type": args.type,
        "symmetric": args.symmetric,
        "strategy": args.strategy,
        "group_size": args.group_size,
        "block_structure": list(args.block_structure) if args.block_structure else None,
        "dynamic": args.dynamic,
        "actorder": actorder,
        "observer": observer,
        "observer_kwargs": {},
        "scale_dtype": str(SCALE_DTYPES[args.scale_dtype]) if args.scale_dtype else None,
        "zp_dtype": None if args.symmetric else "torch.int8",
    }


def _with_lm_head(plan: Plan) -> dict[str, Any]:
    """The source's, saying of lm_head what is written: readers go by the flag, or by the tensors."""
    tensors, family = plan.checkpoint.tensors, FAMILIES[plan.model_type]
    config = dict(plan.checkpoint.config)
    head = tensors.get(f"{LM_HEAD}.weight")
    tied = head is None or (ties(config, family) and same_data(head, tensors[family.embedding]))
    return config if tied == ties(config, family) else with_ties(config, family, tied)
