"""The variables by which an operator limits what the libraries' kernels use of a processor."""

from __future__ import annotations

ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
LIBRARY_VARIABLES = (
    *ISA_LIMITS, "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE", "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
)  # fmt: skip
"""Those that change which code the libraries choose, and are read under their names."""
KERNEL_VARIABLES = (*LIBRARY_VARIABLES, "ATEN_CPU_CAPABILITY")
"""All of them; ATEN_CPU_CAPABILITY shows in ATen's own level."""
