"""Refusals of NaN and Inf, by the name of the linear."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from compression.errors import NumericalError


def all_finite(tensor: Tensor) -> bool:
    """By the extremes of a tensor that is not empty, NaN being one: `torch.isfinite` takes up to seven bytes
    a number, which for the largest matrices is more than they have themselves."""
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def require_finite_weight(name: str, weight: Tensor) -> None:
    """Refuse NaN and Inf in the weight of module `name`.

    Raises:
        NumericalError: `non_finite_weights`.
    """
    if not all_finite(weight):
        raise NumericalError(
            "non_finite_weights",
            f"The weight of {name} holds NaN or Inf.",
            "The source checkpoint is damaged: download it again.",
        )


def require_finite_result(name: str, weight: Tensor) -> None:
    """Refuse a compressed weight of module `name`, as readers get it, for which its dtype is too narrow.

    Raises:
        NumericalError: `weights_out_of_range`.
    """
    if not all_finite(weight):
        raise NumericalError(
            "weights_out_of_range",
            f"The weight of {name} is so large that it leaves {weight.dtype} when it is compressed.",
            "Leave this module out with ignore, or convert the checkpoint to a dtype with a wider range.",
        )


def require_finite_input_scale(name: str, scale: Tensor) -> None:
    """Refuse what calibration fixes of the input of module `name` where its dtype is too narrow.

    Raises:
        NumericalError: `non_finite_activations`.
    """
    if not all_finite(scale):
        raise NumericalError(
            "non_finite_activations",
            f"The input of {name} holds numbers beyond {scale.dtype}, in which its scale is stored.",
            "Use a scheme that finds this at run time, such as FP8_DYNAMIC, or convert the checkpoint to a "
            "dtype with a wider range.",
        )


@contextmanager
def named(linears: Sequence[str]) -> Iterator[None]:
    """Methods see tensors only: what they raise gets the names of the linears that are solved."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(error.code, f"{', '.join(linears)}: {error.message}", error.hint) from error
