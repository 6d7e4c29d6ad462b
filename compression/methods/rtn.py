"""Round to nearest."""

from __future__ import annotations

from torch import Tensor

from compression.params import QuantizationParams
from compression.quantizer import QuantizedWeight, quantize
from compression.schemes import QuantizationArgs


def rtn(weight: Tensor, args: QuantizationArgs, params: QuantizationParams) -> QuantizedWeight:
    """Every weight [out, in] takes the code nearest to it, computed in float32."""
    return QuantizedWeight(quantize(weight, params, args), params, args)
