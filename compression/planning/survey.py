"""What config.json and the headers say of a model, whatever a recipe will make of it.

Plans of one model share it: who plans many jobs surveys each folder once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from compression.boundary import foreign
from compression.checkpoint.block_fp8 import dequantized
from compression.checkpoint.headers import Checkpoint, read_checkpoint
from compression.errors import PlanError, Problem
from compression.families.configuration import as_read
from compression.families.decoder import LM_HEAD, Decoder, read_decoder
from compression.families.naming import module_names, with_model_names
from compression.families.stacks import unstacked
from compression.planning import checks, model_checks
from compression.planning.assignment import Linear
from compression.planning.guide import GuideModel


@dataclass(frozen=True)
class Survey:
    """A checkpoint and the decoder that is in it.

    checkpoint: tensors under the model's own names, one for each linear. linears: in forward order, lm_head
    last, whether or not it is tied. modules: names of all modules that have tensors. tower: tensors of the
    vision tower; unknown: those that the model does not have. problems: why no recipe can be followed.
    """

    checkpoint: Checkpoint
    decoder: Decoder
    linears: tuple[Linear, ...]
    modules: tuple[str, ...]
    tower: tuple[str, ...]
    unknown: tuple[str, ...]
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]

    @cached_property
    def guide(self) -> GuideModel:
        """What the guide's rules for memory need."""
        return GuideModel.of(
            self.checkpoint.tensors,
            layers_prefix=self.decoder.layers_prefix,
            num_layers=self.decoder.num_layers,
            hidden_size=self.decoder.hidden_size,
        )

    @cached_property
    def parameters(self) -> int:
        """How many numbers the tensors hold."""
        return sum(info.spec.elements for info in self.checkpoint.tensors.values())

    @cached_property
    def copied_bytes(self) -> int:
        """The size of the files that are copied as they are: the tokenizer's, for example."""
        folder = self.checkpoint.folder
        with foreign("source_unreadable", "The model folder cannot be read"):
            return sum((folder / name).stat().st_size for name in self.checkpoint.other_files)


def survey(folder: Path) -> Survey:
    """Look at a model, with every problem of it that can be found.

    Raises:
        SourceError: of `read_checkpoint` and `dequantized`.
        PlanError: there is no decoder that the engine knows.
    """
    checkpoint = dequantized(read_checkpoint(folder))
    warnings: list[Problem] = []
    problems = checks.source_problems(checkpoint, warnings)
    decoder = read_decoder(checkpoint.config)
    if not isinstance(decoder, Decoder):
        raise PlanError(*problems, *decoder)
    vision = decoder.family.vision
    checkpoint = with_model_names(checkpoint, vision)
    checkpoint = replace(checkpoint, config=as_read(checkpoint.config, decoder.family))
    decoder = model_checks.tied_as_stored(decoder, checkpoint, warnings)
    tower = tuple(sorted(name for name in checkpoint.tensors if name.startswith(vision.modules)))
    expected = _expected(checkpoint, decoder)
    if not any(problem.code == "source_already_quantized" for problem in problems):
        wrapped = model_checks.wrapped_names(checkpoint, vision, expected)
        problems += wrapped or checks.tensor_problems(checkpoint, decoder, expected)
    linears = _linears(checkpoint, decoder)
    return Survey(
        checkpoint=checkpoint if problems else unstacked(checkpoint, decoder),
        decoder=decoder,
        linears=tuple(linears),
        modules=(*_leaf_modules(expected, linears), *module_names(checkpoint, tower)),
        tower=tower,
        unknown=tuple(sorted(checkpoint.tensors.keys() - expected.keys() - set(tower))),
        problems=tuple(problems),
        warnings=(
            *warnings,
            *checks.fp8_warnings(checkpoint),
            *model_checks.left_out_warnings(checkpoint.left_out),
        ),
    )


def _layer_count(checkpoint: Checkpoint, decoder: Decoder) -> int:
    """Layers to look at: config.json cannot make us look for more than there are tensors."""
    count = tensors = 0
    while count < decoder.num_layers and tensors < len(checkpoint.tensors):
        shape = decoder.layer(count)
        tensors += decoder.sizes["experts"] if decoder.is_sparse(count) and not shape.stacks else 1
        count += 1
    return count


def _expected(checkpoint: Checkpoint, decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """Every tensor that the model has -> its shape."""
    expected = dict(decoder.outside_tensors())
    for index in range(_layer_count(checkpoint, decoder)):
        layer = decoder.layer(index).tensors
        expected |= {f"{decoder.layers_prefix}{index}.{name}": shape for name, shape in layer.items()}
    return expected


def _linears(checkpoint: Checkpoint, decoder: Decoder) -> list[Linear]:
    """Every linear, in forward order, lm_head last whether or not it is tied."""
    linears = []
    for index in range(_layer_count(checkpoint, decoder)):
        prefix = f"{decoder.layers_prefix}{index}."
        for group in decoder.layer(index).groups:
            first = prefix + group.linears[0].name
            experts = prefix + group.experts if group.experts else ""
            linears += [
                Linear(prefix + spec.name, decoder.shape(spec), index, first, experts, spec.gate)
                for spec in group.linears
            ]
    linears.append(Linear(LM_HEAD, (decoder.vocab_size, decoder.hidden_size), None, LM_HEAD))
    return linears


def _leaf_modules(expected: dict[str, tuple[int, ...]], linears: Sequence[Linear]) -> list[str]:
    names = (key.rpartition(".")[0] for key in expected if key.endswith((".weight", ".bias")))
    return list(dict.fromkeys([*names, *(linear.name for linear in linears)]))
