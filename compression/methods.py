"""The methods: for each the step that asks for it, its solver, and what else Bitmill has to know of it.

To add one, write its mathematics in a file of `compression/math`, and here its step and its entry: recipe,
plan, estimates, catalogue, recipes of LLM Compressor, names of the Python package and options of the command
line read this table. A method that lives elsewhere calls `register` before `compression.recipe` is imported,
whose schema lists all steps.

A solver is found by its name when it is first needed, so that nothing here imports torch:

    quantizes   (weight [out, in], gram [in, in] | None, args, params, *, keep, **options) -> grid.Rounded
    prunes      (weight [out, in], gram [in, in] | None, *, splits, **options)             -> prune.Pruned
    smooths     (readers: scaling.Readers, **options)                                      -> scales [in]

where options are those of the step (`Step.options`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from compression.steps import PruningStep, QuantizingStep, SmoothingStep, Step

Kind = Literal["quantizes", "prunes", "smooths"]
GuideRule = Literal["rtn", "gptq", "sparsegpt", "awq"]
_KINDS: dict[Kind, type[Step]] = {
    "quantizes": QuantizingStep,
    "prunes": PruningStep,
    "smooths": SmoothingStep,
}


class Linears(NamedTuple):
    """What a method's cost is counted for: linears that read one input, [rows, columns] stacked.

    linears: how many they are.
    """

    rows: int
    columns: int
    linears: int


class Cost(NamedTuple):
    """operations: of matrix products. columns: that are walked one after the other. rounded: weights that are
    rounded, as the observer does, to find something out."""

    operations: float = 0.0
    columns: float = 0.0
    rounded: float = 0.0


def _no_cost(_step: Any, _linears: Linears) -> Cost:
    return Cost()


@dataclass(frozen=True)
class Method:
    """One method.

    step: its class. solver: "module:function". description, recovery, source: for people who choose.
    needs_data: whether it learns from calibration data. peer_name: its class in LLM Compressor, "" without.
    solves_together: linears that read one input are solved as one stacked matrix, which saves time; if not,
    one by one, which saves memory. work_bytes: work space beside the weights, of (numbers of the weight,
    bytes of the Gram matrix). cost: of a step on linears. guide_rule: which rule of LLM Compressor's guide
    counts its memory. folds_linears: it also moves scales between a linear and the one in front of it.
    tries_rounding: it finds its scales by rounding, so that a step which quantizes must follow.
    """

    step: type[Step]
    solver: str
    description: str
    recovery: str
    source: str = ""
    needs_data: bool = True
    peer_name: str = ""
    solves_together: bool = True
    work_bytes: Callable[[int, int], int] = lambda numbers, _gram: 5 * numbers  # scaled, and codes
    cost: Callable[[Any, Linears], Cost] = _no_cost
    guide_rule: GuideRule = "rtn"
    folds_linears: bool = False
    tries_rounding: bool = False

    @property
    def name(self) -> str:
        """The step's `type`."""
        name: str = self.step.model_fields["type"].default
        return name

    @property
    def kind(self) -> Kind:
        return next(kind for kind, base in _KINDS.items() if issubclass(self.step, base))

    @property
    def solve(self) -> Callable[..., Any]:
        """The solver, which imports torch."""
        module, _, function = self.solver.partition(":")
        solver: Callable[..., Any] = getattr(import_module(module), function)
        return solver


METHODS: dict[str, Method] = {}
"""By name, in the order in which they are listed for people."""


def register(method: Method) -> None:
    """Make a method known. A second one of the same name is an error."""
    if method.name in METHODS:
        raise ValueError(f"there is a method {method.name!r} already")
    METHODS[method.name] = method


def method_of(step: Step) -> Method:
    return METHODS[step.type]


def method_names(*kinds: Kind) -> tuple[str, ...]:
    """Names of the methods of these kinds, kind by kind."""
    return tuple(name for kind in kinds for name, method in METHODS.items() if method.kind == kind)


def makers(*, sparse: bool) -> tuple[str, ...]:
    """Methods of the short form of a job, by which a scheme is made, or a sparse one."""
    return tuple(
        name
        for name, method in METHODS.items()
        if (method.kind == "prunes" if sparse else method.kind == "quantizes" or method.tries_rounding)
    )


def peer_names() -> dict[str, str]:
    """LLM Compressor's class names, accepted wherever a step's type is read -> names of methods."""
    return {method.peer_name: name for name, method in METHODS.items() if method.peer_name}


def public_names() -> dict[str, type[Step]]:
    """The classes of all steps by their names in Python, ours and LLM Compressor's."""
    ours = {method.step.__name__: method.step for method in METHODS.values()}
    return ours | {method.peer_name: method.step for method in METHODS.values() if method.peer_name}


def any_step() -> Any:
    """The type of a step in a recipe: one of all that are registered by now, told apart by `type`."""
    steps: Any = None
    for method in METHODS.values():
        steps = method.step if steps is None else steps | method.step
    return Annotated[steps, Field(discriminator="type")]


def _walk(_step: Any, linears: Linears) -> Cost:
    """A Cholesky factor of the Gram matrix, and feedback of every column's errors into those that follow."""
    square = linears.rows * linears.columns**2
    return Cost(operations=square + linears.columns**3 / 3, columns=linears.columns)


class RTNStep(QuantizingStep):
    """Round to nearest. Without a dataset the observer is minmax or mse (the default)."""

    type: Literal["rtn"] = "rtn"


register(
    Method(
        RTNStep,
        "compression.math.grid:round_to_nearest",
        "Rounds every weight to the nearest code.",
        "Moderate recovery in most cases; computationally cheap and fast, and without data.",
        needs_data=False,
        peer_name="QuantizationModifier",
        solves_together=False,
    )
)


class GPTQStep(QuantizingStep):
    """Second-order rounding with error feedback (Frantar et al., 2022, arXiv:2210.17323, algorithm 1).

    block_size: columns whose error is applied together. dampening_frac: fraction of the mean of the Gram
    diagonal added to it. actorder "static": columns in order of falling diagonal, groups as on disk.
    """

    type: Literal["gptq"] = "gptq"
    block_size: int = Field(default=128, strict=True, ge=1, le=1 << 20)
    dampening_frac: float = Field(default=0.01, strict=True, gt=0, le=1)
    actorder: Literal["static"] | None = "static"


register(
    Method(
        GPTQStep,
        "compression.math.gptq:gptq",
        "Rounds column by column, and moves the error of each into those that follow.",
        "High recovery, but more expensive and slower to run: statistics of every input, and a walk over its "
        "columns.",
        "https://arxiv.org/abs/2210.17323",
        peer_name="GPTQModifier",
        work_bytes=lambda numbers, gram: max(8 * numbers, 4 * numbers + 3 * gram),
        cost=_walk,
        guide_rule="gptq",
    )
)


AWQ_ROWS = 128
"""Rows of each linear, evenly spread, on which AWQ tries its scales: docs/adr/0017."""


class AWQStep(SmoothingStep):
    """Scales up, before the linears are quantized, the channels that matter, and down in the norm or linear
    in front of them (Lin et al., 2023, arXiv:2306.00978, section 3.2), so that least is lost when they are
    rounded by the observer of the step that follows.

    n_grid: exponents that are tried. duo_scaling: whether the weights' magnitudes count beside those of the
    activations; "both" tries with and without. offload_device: accepted and without effect, since activations
    are never all on the device.
    """

    type: Literal["awq"] = "awq"
    n_grid: int = Field(default=20, strict=True, ge=1, le=1000)
    duo_scaling: Annotated[bool, Field(strict=True)] | Literal["both"] = True
    offload_device: Literal["cpu"] | None = Field(default=None, exclude=True)

    @property
    def options(self) -> dict[str, Any]:
        return {"n_grid": self.n_grid, "duo_scaling": self.duo_scaling, "rows": AWQ_ROWS}


def _tries_of_awq(step: AWQStep, linears: Linears) -> Cost:
    tries = step.n_grid * (2 if step.duo_scaling == "both" else 1)
    numbers = min(linears.rows, linears.linears * AWQ_ROWS) * linears.columns
    return Cost(operations=tries * 2 * numbers * linears.columns, rounded=tries * numbers)


register(
    Method(
        AWQStep,
        "compression.math.awq:awq_scales",
        "Scales up the channels that matter, and down in the norm or linear in front.",
        "Better recovery with a faster runtime than GPTQ, says LLM Compressor's guide; here its search of "
        "scales takes more passes of the data.",
        "https://arxiv.org/abs/2306.00978",
        peer_name="AWQModifier",
        cost=_tries_of_awq,
        guide_rule="awq",
        folds_linears=True,
        tries_rounding=True,
    )
)


class SmoothQuantStep(SmoothingStep):
    """Moves outliers of activations into the weights that read them, before these are quantized (Xiao et al.,
    2022, arXiv:2211.10438, equation 4).

    smoothing_strength: 0 leaves the range to the activations, 1 gives all of it to the weights.
    """

    type: Literal["smoothquant"] = "smoothquant"
    smoothing_strength: float = Field(default=0.5, strict=True, ge=0, le=1)


register(
    Method(
        SmoothQuantStep,
        "compression.math.smoothquant:smoothquant_scales",
        "Moves outliers of activations into the weights, by folding scales into the norms.",
        "Good recovery where activations are quantized too, with minimal calibration time; to be composed "
        "with other methods.",
        "https://arxiv.org/abs/2211.10438",
        peer_name="SmoothQuantModifier",
    )
)


class SparseGPTStep(PruningStep):
    """Prunes with error feedback (Frantar and Alistarh, 2023, arXiv:2301.00774).

    block_size: columns whose mask is chosen together. dampening_frac: as in GPTQStep.
    """

    type: Literal["sparsegpt"] = "sparsegpt"
    block_size: int = Field(default=128, strict=True, ge=1, le=1 << 20)
    dampening_frac: float = Field(default=0.01, strict=True, gt=0, le=1)


def _masks_of_sparsegpt(numbers: int, gram: int) -> int:
    """Columns, their originals, masks and results; later the Gram, its copy and its factor."""
    return max(25 * numbers, 4 * numbers + 3 * gram)


register(
    Method(
        SparseGPTStep,
        "compression.math.sparsegpt:sparsegpt",
        "Prunes column by column, and makes up for each in those that follow.",
        "The highest recovery of the three that prune; as slow as gptq.",
        "https://arxiv.org/abs/2301.00774",
        peer_name="SparseGPTModifier",
        work_bytes=_masks_of_sparsegpt,
        cost=_walk,
        guide_rule="sparsegpt",
    )
)


def _sorted_scores(numbers: int, _gram: int) -> int:
    return 28 * numbers


class WandaStep(PruningStep):
    """Prunes by weight times input norm, row by row (Sun et al., 2023, arXiv:2306.11695)."""

    type: Literal["wanda"] = "wanda"


register(
    Method(
        WandaStep,
        "compression.math.prune:wanda",
        "Prunes by weight times input norm, row by row.",
        "Moderate recovery; hardly any time beside the statistics.",
        source="https://arxiv.org/abs/2306.11695",
        peer_name="WandaPruningModifier",
        work_bytes=_sorted_scores,
    )
)


class MagnitudeStep(PruningStep):
    """Prunes the smallest weights; needs no data."""

    type: Literal["magnitude"] = "magnitude"


register(
    Method(
        MagnitudeStep,
        "compression.math.prune:magnitude",
        "Prunes the smallest weights.",
        "Low recovery; the cheapest, and without data.",
        needs_data=False,
        work_bytes=_sorted_scores,
    )
)
