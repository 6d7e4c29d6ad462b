"""What speaks against a job: each function looks at one thing and returns the problems it finds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import PurePath

from compression.checkpoint.headers import Checkpoint
from compression.checkpoint.tensors import BlockScaledWeight
from compression.data.documents import check_format
from compression.errors import Problem, SourceError, some
from compression.families.decoder import Decoder
from compression.families.native_models import NATIVE_MODEL_TYPES
from compression.methods import method_of
from compression.planning.memory import Workload
from compression.recipe import DatasetSpec, Recipe
from compression.schemes import Scheme, get_scheme

COMPUTE_DTYPES = ("BF16", "F16", "F32")

_QUANTIZED_SUFFIXES = (
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_packed",
    ".weight_zero_point",
    ".qweight",
    ".qzeros",
    ".g_idx",
    ".SCB",
    ".absmax",
    ".quant_map",
    "_blocks",
)


def with_observers(recipe: Recipe, has_data: bool) -> Recipe:
    """The recipe with every step's default observer written out: imatrix with data, mse without."""
    default = "imatrix" if has_data else "mse"
    steps = list(recipe.steps)
    for number, step in recipe.quantizing.items():
        steps[number] = step.model_copy(update={"observer": step.observer or default})
    return recipe.model_copy(update={"steps": tuple(steps)})


def recipe_problems(recipe: Recipe, has_data: bool) -> list[Problem]:
    """Steps that learn from data, where there is none."""
    if has_data:
        return []
    problems = [
        Problem(
            "dataset_required",
            f"{step.scheme} learns the range of activations from calibration data; the job has no dataset.",
            "Give a dataset, or a scheme that finds this at run time, such as FP8_DYNAMIC or MXFP4.",
            f"/recipe/steps/{number}/scheme",
        )
        for number, step in recipe.quantizing.items()
        if get_scheme(step.scheme).fixed_input
    ]
    learning: list[tuple[str, str]] = [(recipe.smoothing.type, "/dataset")] if recipe.smoothing else []
    if recipe.kv_cache_step is not None:
        pointer = f"/recipe/steps/{recipe.kv_cache_step}/kv_cache_scheme"
        learning.append(("The scale of the KV cache", pointer))
    learning += [(step.type, "/dataset") for step in recipe.pruning.values() if method_of(step).needs_data]
    for number, step in recipe.quantizing.items():
        if method_of(step).needs_data:
            learning.append((step.type, "/dataset"))
        elif step.observer in ("imatrix", "gram"):
            learning.append((f"The observer {step.observer}", f"/recipe/steps/{number}/observer"))
    return problems + [
        Problem(
            "dataset_required",
            f"{what} learns from calibration data, and the job has no dataset.",
            "Give a dataset, or use rtn with the observer mse or minmax, or magnitude to prune.",
            pointer,
        )
        for what, pointer in learning
    ]


def dataset_problems(dataset: DatasetSpec | None) -> list[Problem]:
    """A file of a kind that no text is read from."""
    file = dataset and (dataset.path or dataset.s3)
    try:
        if file:
            check_format(PurePath(file))
    except SourceError as error:
        return [Problem(error.code, error.message, error.hint, "/dataset")]
    return []


def source_problems(checkpoint: Checkpoint, warnings: list[Problem]) -> list[Problem]:
    """Code that would come with the model, and weights that are quantized already."""
    problems = []
    model_type = str(checkpoint.config.get("model_type"))
    if checkpoint.config.get("auto_map"):
        if model_type in NATIVE_MODEL_TYPES:
            warnings.append(
                Problem(
                    "remote_code_ignored",
                    f"config.json refers to code of its own (auto_map); Transformers knows {model_type} and "
                    "its own implementation is used.",
                )
            )
        else:
            problems.append(
                _of_model(
                    "remote_code_required",
                    f"Transformers has no model of type {model_type[:100]!r}; loading it would run code from "
                    "the model's folder (auto_map), which Bitmill never does.",
                    "Use a model that Transformers supports itself.",
                )
            )
    marks = [name for name in checkpoint.tensors if name.endswith(_QUANTIZED_SUFFIXES)]
    if checkpoint.config.get("quantization_config") or marks:
        sign = f"it has tensors such as {min(marks)}" if marks else "config.json has a quantization_config"
        problems.append(
            _of_model(
                "source_already_quantized",
                f"The model is already quantized: {sign}.",
                "Start from the original checkpoint in BF16, F16, F32 or block FP8 (weight_scale_inv).",
            )
        )
    return problems


def tensor_problems(
    checkpoint: Checkpoint, decoder: Decoder, expected: Mapping[str, tuple[int, ...]]
) -> list[Problem]:
    """Tensors that config.json implies and that are absent, of another shape, or not of a float type."""
    tensors = checkpoint.tensors
    missing = [name for name in expected if name not in tensors]
    present = {name: tensors[name] for name in expected if name in tensors}
    reshaped = [
        f"{info.name} is {list(info.shape)}, config.json implies {list(expected[name])}"
        for name, info in present.items()
        if info.shape != expected[name]
    ]
    mistyped = [
        f"{info.name} is {info.dtype}" for info in present.values() if info.dtype not in COMPUTE_DTYPES
    ]
    problems = []
    if decoder.num_layers > len(tensors):
        missing.append(f"{decoder.layers_prefix}{decoder.num_layers - 1}")
    parts = decoder.family.vision.modules
    missing += [part for part in parts if not any(name.startswith(part) for name in tensors)]
    if missing:
        problems.append(
            _of_model(
                "checkpoint_incomplete",
                f"{len(missing)} tensors that config.json implies are missing: {some(missing)}.",
                "Download the model again, or correct config.json.",
            )
        )
    if reshaped:
        problems.append(
            _of_model(
                "shape_mismatch",
                f"{len(reshaped)} tensors contradict config.json: {some(reshaped)}.",
                "Correct config.json, or take the files that belong to it.",
            )
        )
    if mistyped:
        problems.append(
            _of_model(
                "unsupported_dtype",
                f"{len(mistyped)} tensors are of a type that is not compressed: {some(mistyped)}.",
                f"Convert them to one of {', '.join(COMPUTE_DTYPES)}.",
            )
        )
    return problems


def smoothing_problems(recipe: Recipe, decoder: Decoder) -> list[Problem]:
    """A step that moves scales, on a model where there is nothing in front of linears to move them into."""
    step, groups = recipe.smoothing, decoder.family.groups
    if step is None or any(
        group.norm or (method_of(step).folds_linears and group.producer) for group in groups
    ):
        return []
    return [
        Problem(
            "nothing_to_smooth",
            f"{decoder.family.architecture} has no norm in front of its linears to fold scales into.",
            f"Leave {step.type} out of the recipe.",
            "/recipe/steps/0",
        )
    ]


def router_warnings(recipe: Recipe, decoder: Decoder) -> list[Problem]:
    """Norms that routers read, which a step that smooths leaves alone."""
    if recipe.smoothing is None or decoder.family.sparse is None:
        return []
    return [
        Problem(
            "experts_not_smoothed",
            "The norm in front of experts also feeds their router, whose choice scales in it would change: "
            "experts are not smoothed, the linears behind other norms are.",
        )
    ]


def cache_problems(recipe: Recipe, decoder: Decoder, attention: str | None) -> list[Problem]:
    """Scales of keys and values, for a model of which readers would not find them."""
    step = recipe.kv_cache_step
    if step is None or attention is not None:
        return []
    return [
        Problem(
            "kv_cache_not_supported",
            f"{decoder.family.architecture} has no k_proj or qkv_proj, by which readers find the attention "
            "modules whose keys and values are cached.",
            "Leave kv_cache_scheme out.",
            f"/recipe/steps/{step}/kv_cache_scheme",
        )
    ]


def dense_warnings(recipe: Recipe) -> list[Problem]:
    """Pruned weights take no less room."""
    if not recipe.pruning:
        return []
    return [
        Problem(
            "pruned_stored_dense",
            "Pruned weights are stored with their zeros: no reader takes a sparse format any more.",
        )
    ]


def fp8_warnings(checkpoint: Checkpoint) -> list[Problem]:
    """Weights that a step does not see as they are stored."""
    weights = [tensor for tensor in checkpoint.tensors.values() if isinstance(tensor, BlockScaledWeight)]
    if not weights:
        return []
    return [
        Problem(
            "source_dequantized",
            f"{len(weights)} weights are stored in block FP8. They are compressed from {weights[0].dtype}; "
            "those that are not compressed are written in it.",
        )
    ]


def dtype_warnings(stated: str | None, dtypes: Collection[str], schemes: Iterable[Scheme]) -> list[Problem]:
    """A model in another dtype than the one in which readers compute with what a scheme makes.

    stated: what config.json says. dtypes: those of the compressed weights.
    """
    names = ", ".join(dict.fromkeys(scheme.name for scheme in schemes if scheme.read_in_bfloat16))
    if not names or stated == "bfloat16" or (stated is None and set(dtypes) == {"BF16"}):
        return []
    return [
        Problem(
            "read_in_bfloat16",
            f"Readers compute with {names} in bfloat16 only, and the model is in "
            f"{stated or ', '.join(sorted(dtypes))}: the config.json that is written says bfloat16. Tensors "
            "that are not compressed keep their dtype on disk.",
        )
    ]


def unknown_warnings(unknown: Sequence[str]) -> list[Problem]:
    """Tensors that the model does not have."""
    if not unknown:
        return []
    return [
        Problem(
            "unknown_tensors_copied",
            f"{len(unknown)} tensors are not part of the model and are copied as they are: {some(unknown)}.",
        )
    ]


def spill_warnings(held_bytes: int, budget_bytes: int, spill_bytes: int) -> list[Problem]:
    """Hidden states that go to disk, because suspended forwards together hold more than the budget."""
    if not spill_bytes:
        return []
    return [
        Problem(
            "activations_on_disk",
            f"The suspended forwards would hold {held_bytes / 1e9:.2f} GB; the activation budget is "
            f"{budget_bytes / 1e9:.2f} GB. Hidden states go to a scratch file of {spill_bytes / 1e9:.2f} GB, "
            "and each layer runs up to each of its groups once more.",
            "Fewer or shorter calibration samples, or a larger budget, make the job faster.",
        )
    ]


def generation_warnings(work: Workload) -> list[Problem]:
    """Text that the model is to write itself, which no other figure of the plan counts."""
    if not work.generates:
        return []
    numbers = work.layers_numbers + 2 * work.matrix_numbers
    return [
        Problem(
            "generation_not_in_duration",
            f"The model writes its own calibration text, token by token, each from all of its {numbers:,} "
            "weights. The duration does not count that.",
            "Fewer or shorter calibration samples, or text of your own, make the job faster.",
        )
    ]


def _of_model(code: str, message: str, hint: str) -> Problem:
    return Problem(code, message, hint, "/model")
