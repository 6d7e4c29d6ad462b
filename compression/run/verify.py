"""Two checks that make a result trustworthy: the model is the one that was planned, and the files hold what
was meant."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from compression.checkpoint.formats import decode
from compression.checkpoint.headers import read_header
from compression.checkpoint.layout import TensorSpec
from compression.checkpoint.reader import TORCH_DTYPES, read_infos
from compression.checkpoint.tensors import TensorInfo
from compression.errors import PlanError, Problem, SelfCheckError
from compression.families.naming import on_disk
from compression.model.streamed import StreamedModel
from compression.planning.plans import ModulePlan, Plan
from compression.planning.shards import stored_layer, stored_tensors
from compression.report import ModuleReport
from compression.run.config import quantization_config

_FAULT = "This is a fault of Bitmill's tables; please report it with the model's config.json."


def check_against_model(plan: Plan, model: StreamedModel) -> None:
    """Compare the plan, made from headers, with the modules and shared inputs of the real (empty) model.

    Raises:
        PlanError: `plan_mismatch`.
    """
    planned = {module.name: module for layer in plan.layers for module in layer.modules}
    planned |= {module.name: module for module in plan.kept}
    linears = model.linears()
    if differing := sorted(planned.keys() ^ linears.keys()):
        raise _mismatch(f"plan and model differ in their linears: {', '.join(differing[:5])}")
    for name, module in planned.items():
        real = (linears[name].out_features, linears[name].in_features)
        if real != module.shape:
            raise _mismatch(f"{name} is planned as {module.shape}, and is {real}")
    groups, readers = model.trace([fold.norm for layer in plan.layers for fold in layer.folds.values()])
    for group in groups:
        if len({planned[name].group for name in group}) != 1:
            raise _mismatch(f"{', '.join(group)} read one tensor, and are planned apart")
        shared = {name for name, module in planned.items() if module.group == planned[group[0]].group}
        if shared != set(group):
            raise _mismatch(f"{', '.join(sorted(shared))} are planned to read one tensor, and do not")
    for name, shape in model.tower().items():
        info = plan.checkpoint.tensors.get(name)
        if info is None or info.shape != shape:
            found = "not there" if info is None else info.shape
            raise _mismatch(
                f"{name} is {found} on disk, and {shape} in the model",
                "The checkpoint is incomplete, or its config.json belongs to another model.",
            )
    for layer in plan.layers:
        for fold in layer.folds.values():
            if readers[fold.norm] != {m.name for m in layer.modules if m.group == fold.group}:
                raise _mismatch(
                    f"{fold.norm} is read by {', '.join(sorted(readers[fold.norm])) or 'nothing'}"
                )


def check_files(plan: Plan, folder: Path, rows: Sequence[ModuleReport]) -> None:
    """Read every written tensor's header and every compressed module back, and compare with what was meant.

    Names, dtypes and shapes are held against the plan; each module is dequantized by the compressed-tensors
    library and its digest compared with the one taken when it was solved; the library parses the config.

    Raises:
        SelfCheckError: `self_check_failed`, naming the module.
    """
    if quantization := quantization_config(plan):
        QuantizationConfig.model_validate(quantization)
    meant = {row.name: row.dequantized_sha256 for row in rows}
    for layer in plan.layers:
        header = read_header(folder / layer.shard)
        _check_names(header, stored_layer(plan.checkpoint, layer))
        in_model = layer.in_model(header)
        for module in layer.modules:
            stored = layer.in_model(read_infos(in_model[name] for name in _stored_names(module)))
            weight = decode(module.name, stored, module.scheme, TORCH_DTYPES[module.dtype])
            if sha256_of(weight) != meant[module.name]:
                raise _failed(module.name, "reads back as another weight than the one that was solved")
    for file, keys in plan.outside:
        meant_outside = {name: info.spec for name, info in on_disk(plan.checkpoint, keys).items()}
        _check_names(read_header(folder / file), meant_outside)


def _check_names(header: Mapping[str, TensorInfo], expected: Mapping[str, TensorSpec]) -> None:
    for name in sorted(expected.keys() | header.keys()):
        written = header[name].spec if name in header else None
        if written != expected.get(name):
            raise _failed(name, f"is {written} on disk, {expected.get(name)} in the plan")


def _stored_names(module: ModulePlan) -> list[str]:
    specs = stored_tensors(module.scheme, module.shape, module.dtype)
    return [f"{module.name}.{suffix}" for suffix in specs]


def _mismatch(reason: str, hint: str = _FAULT) -> PlanError:
    return PlanError(Problem("plan_mismatch", f"The plan does not fit the model: {reason}.", hint))


def _failed(name: str, reason: str) -> SelfCheckError:
    return SelfCheckError("self_check_failed", f"{name} {reason}.", "Nothing was published; check the disk.")


def sha256_of(tensor: Tensor) -> str:
    """Digest of a tensor's bytes in row-major order: by it what was meant is compared with what is read."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()
