"""Scales of linears that are solved together: which of them are found over which rows, by which observer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from compression.gram import Gram
from compression.params import QuantizationParams
from compression.quantizer import minmax_params, search_params
from compression.schemes import QuantizationArgs
from compression.steps import Observer


def observe(
    names: Sequence[str],
    stacked: Tensor,
    rows: Sequence[int],
    gram: Gram | None,
    observer: Observer | None,
    args: QuantizationArgs,
    scale_dtype: torch.dtype,
) -> list[QuantizationParams]:
    """The parameters of each linear, as stored. stacked: [out, in] float32, so many rows of each linear.

    Linears are looked at together where each row has scales of its own anyway, and where a scale belongs to a
    whole tensor: then those that vLLM makes one matrix of, which has one such scale, get the same
    (docs/adr/0010-one-scale-for-what-vllm-fuses.md).
    """
    found: list[QuantizationParams] = []
    start = 0
    for _, members in groupby(zip(names, rows, strict=True), lambda each: _together(each[0], args)):
        counts = [count for _, count in members]
        part = stacked[start : start + sum(counts)]
        params = _observe(part, gram, observer, args, scale_dtype)
        start += len(part)
        if args.strategy in ("tensor", "block"):
            found += [params] * len(counts)
        else:
            found += _split(params, counts)
    return found


def stack_by_row(
    params: Sequence[QuantizationParams], args: QuantizationArgs, rows: Sequence[int]
) -> QuantizationParams:
    """The parameters of linears of so many rows, stacked along out: a grid `args.by_row`."""
    each = [one.by_row(args, count) for one, count in zip(params, rows, strict=True)]
    zero_points = [one.zero_point for one in each if one.zero_point is not None]
    return QuantizationParams(
        torch.cat([one.scale for one in each]), torch.cat(zero_points) if zero_points else None
    )


def _together(name: str, args: QuantizationArgs) -> str:
    """What linears have in common that are looked at as one matrix."""
    if args.strategy == "block":
        return name
    return name.rpartition(".")[0] if args.strategy in ("tensor", "tensor_group") else ""


def _split(params: QuantizationParams, rows: Sequence[int]) -> Iterator[QuantizationParams]:
    start = 0
    for count in rows:
        yield params.rows(start, start + count)
        start += count


def _observe(
    weight: Tensor,
    gram: Gram | None,
    observer: Observer | None,
    args: QuantizationArgs,
    scale_dtype: torch.dtype,
) -> QuantizationParams:
    if observer == "minmax":
        return minmax_params(weight.to(scale_dtype), args, scale_dtype)
    if observer == "mse":
        return search_params(weight, args, scale_dtype)
    assert gram is not None  # the plan refuses these observers without a dataset
    if observer == "gram":
        return search_params(weight, args, scale_dtype, gram=gram.matrix)
    return search_params(weight, args, scale_dtype, importance=gram.importance())
