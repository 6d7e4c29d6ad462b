"""The activations of a run: all batches, held between layers, in the roles in which they pass the model.
Others call this the calibration cache.

calibration   what statistics are taken from: it sees the compressed weights of all that came before it
original      held-out text through the weights of the checkpoint
compressed    the same text through the compressed weights, activation quantization simulated
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor

from compression.data.calibration import TokenBlocks, make_batches
from compression.machine.arithmetic import Arithmetic
from compression.machine.clock import Clock
from compression.math.comparison import Comparison
from compression.math.gram import Gram, accumulate_gram
from compression.model.batches import ExpertsInputs, SuspendedBatches
from compression.model.expert_grams import ExpertGrams, ExpertInputs
from compression.model.experts import Experts
from compression.model.hooks import ForwardHooks
from compression.model.kv_cache import KVCache
from compression.model.spill import Spill
from compression.model.streamed import StreamedModel
from compression.planning.memory import LOGITS_IN_A_BATCH
from compression.planning.plans import FoldPlan, LayerPlan, ModulePlan, Plan
from compression.report import EvaluationReport

T = TypeVar("T")


@dataclass(frozen=True)
class LinearGroup:
    """Linears that read one tensor, and that tensor in every batch: [batch, seq, in], or [rows, in] of an
    expert; None without data."""

    modules: tuple[ModulePlan, ...]
    inputs: Iterable[Tensor] | None

    @property
    def name(self) -> str:
        """The first of its linears, by which the plan knows it."""
        return self.modules[0].group

    def gram(self) -> Gram | None:
        """Statistics of the input; None without data."""
        if self.inputs is None:
            return None
        if isinstance(self.inputs, ExpertInputs):
            return self.inputs.gram()
        return accumulate_gram(self.inputs)

    def largest_input(self) -> Tensor | None:
        """The largest magnitude in the input, a scalar, where a scheme fixes the range of activations."""
        if not any(module.scheme and module.scheme.fixed_input for module in self.modules):
            return None
        assert self.inputs is not None  # the plan refuses these schemes without a dataset
        extremes = torch.stack([torch.stack(tensor.aminmax()) for tensor in self.inputs])
        return extremes.abs().amax()


class _Timed(Iterable[T]):
    """Inputs, the making of which is part of the forward pass, whoever goes through them. Those in a list are
    made already; of others a GPU makes the next while it works on the last."""

    def __init__(self, inputs: Iterable[T], clock: Clock) -> None:
        self._inputs = inputs
        self._clock = clock

    def __iter__(self) -> Iterator[T]:
        if isinstance(self._inputs, list):
            yield from self._inputs
            return
        inputs = iter(self._inputs)
        while True:
            with self._clock.phase("forward", waits=False):
                each = next(inputs, None)
            if each is None:
                return
            yield each


class Activations:
    """All batches of a run, suspended between layers. Without data there are none; every pass is empty."""

    def __init__(
        self,
        plan: Plan,
        model: StreamedModel,
        blocks: TokenBlocks | None,
        arithmetic: Arithmetic,
        scratch: Path,
        clock: Clock,
    ) -> None:
        self._clock = clock
        self._model = model
        self._experts_at_once = plan.experts_at_once
        self._split = ""
        self._calibration: SuspendedBatches | None = None
        self._original: SuspendedBatches | None = None
        self._compressed: SuspendedBatches | None = None
        self._spill: Spill | None = None
        self._hooks: ForwardHooks | None = None
        self._cache: KVCache | None = None
        if blocks is None:
            return
        try:
            self._begin(plan, blocks, arithmetic, scratch)
        except BaseException:
            self.close()
            raise

    def _begin(self, plan: Plan, blocks: TokenBlocks, arithmetic: Arithmetic, scratch: Path) -> None:
        """Run every batch up to the entry of layer 0."""
        model = self._model
        if plan.spill_bytes:
            self._spill = Spill(scratch)
        with self._clock.phase("read"):
            model.load_embeddings()
        modules = [module for layer in plan.layers for module in layer.modules]
        activations = {
            m.name: m.scheme.input_activations for m in modules if m.scheme and m.scheme.input_activations
        }
        norms = {fold.group: fold.norm for layer in plan.layers for fold in layer.folds.values()}
        experts = {m.group: m.experts for m in modules if m.experts}
        self._hooks = ForwardHooks(model, {m.name: m.group for m in modules}, activations, norms, experts)
        if attentions := [layer.cache.attention for layer in plan.layers if layer.cache]:
            self._cache = KVCache(map(model.module.get_submodule, attentions))
        suspended = partial(SuspendedBatches, self._hooks, spill=self._spill)
        if plan.calibrates:
            batches = make_batches(blocks.calibration, arithmetic.batch_tokens)
            self._calibration = suspended(batches, quantize_activations=False)
            if self._cache:
                self._cache.learns_from = self._calibration.role
        if blocks.evaluation:
            self._split = blocks.split
            vocabulary = model.module.config.get_text_config().vocab_size
            batches = make_batches(blocks.evaluation, LOGITS_IN_A_BATCH // vocabulary)
            self._original = suspended(batches, quantize_activations=False)
            self._compressed = suspended(batches, quantize_activations=True)
        model.drop_embeddings()

    def pass_original(self, layer: int) -> None:
        """Send the original stream through a layer; to be called while its weights are the checkpoint's."""
        with self._clock.phase("evaluate"):
            if self._original:
                self._original.run_through(layer)

    def groups(self, layer: LayerPlan) -> Iterator[LinearGroup]:
        """The layer's groups in the order in which it runs them, each with the inputs it is about to get.

        Statistics come from the calibration stream; where the recipe needs none, from the compressed one, for
        the report only.
        """
        members = {group: tuple(modules) for group, modules in groupby(layer.modules, lambda m: m.group)}
        stream = self._calibration or self._compressed
        if stream is None:
            yield from (LinearGroup(modules, None) for modules in members.values())
            return
        parked = stream.groups(layer.index)
        while True:
            with self._clock.phase("forward"):
                waiting = next(parked, None)
            if waiting is None:
                return
            if isinstance(waiting, ExpertsInputs):
                yield from self._expert_groups(waiting, members.values())
            else:
                yield LinearGroup(members[waiting.group], _Timed(waiting.inputs, self._clock))

    def _expert_groups(
        self, waiting: ExpertsInputs, groups: Iterable[tuple[ModulePlan, ...]]
    ) -> Iterator[LinearGroup]:
        """The groups of a layer's experts, in the order of the plan, whether or not tokens come to them."""
        experts = self._model.module.get_submodule(waiting.experts)
        assert isinstance(experts, Experts)
        grams = ExpertGrams(experts, _Timed(waiting.inputs, self._clock), self._experts_at_once)
        for modules in groups:
            if modules[0].experts == waiting.experts:
                number, leaf = modules[0].name.removeprefix(waiting.experts + ".").split(".")
                stage = experts.expert(int(number)).stage(leaf)
                yield LinearGroup(modules, ExpertInputs(grams, stage, int(number)))

    def rehearsed(self, layer: int, group: str) -> Iterable[Tensor]:
        """What calibration batches, which wait at the layer's entry, would hand to a group as things are."""
        assert self._calibration is not None  # the plan refuses smoothing without a dataset
        inputs = cast("Iterable[Tensor]", self._calibration.rehearsed(layer, group))  # of linears, no experts
        return _Timed(inputs, self._clock)

    def renew_inputs(self, fold: FoldPlan) -> None:
        """Make the inputs of a group anew, as its norm, which has changed, makes them."""
        assert self._calibration is not None  # the plan refuses smoothing without a dataset
        self._calibration.renew_inputs(fold.group, self._model.module.get_submodule(fold.norm))

    def pass_calibration(self, layer: LayerPlan) -> dict[str, Tensor]:
        """Send the calibration stream on to the next layer; to be called once compressed weights are in.

        Returns what only this pass shows: the scales of the layer's keys and values, by their names on disk.
        """
        with self._clock.phase("forward"):
            if self._calibration:
                self._calibration.run_through(layer.index)
            if self._cache and layer.cache:
                return self._cache.learned(layer.cache)
            return {}

    def pass_compressed(self, layer: LayerPlan, stored: Mapping[str, Tensor]) -> None:
        """Send the compressed stream on to the next layer.

        stored: the layer's tensors as they are on disk, which also say how its activations are quantized.
        """
        with self._clock.phase("evaluate"):
            if self._compressed and self._hooks:
                if self._cache and layer.cache:
                    self._cache.use(layer.cache, stored)
                self._hooks.fixed_inputs = {
                    m.name: stored[f"{m.name}.{m.scheme.fixed_input}"].to(self._model.device)
                    for m in layer.modules
                    if m.scheme and m.scheme.fixed_input
                }
                self._compressed.run_through(layer.index)

    def compare(self) -> EvaluationReport | None:
        """Run the head over the held-out text, and say how far the two models are apart."""
        if self._calibration:
            self._calibration.close()
        if self._original is None or self._compressed is None:
            return None
        with self._clock.phase("evaluate"):
            comparison = Comparison()
            for original, compressed, tokens in self.logits():
                comparison.add(original, compressed, tokens)
                del original, compressed  # before the next batch makes its own
            return comparison.report(self._split)

    def logits(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of each batch of held-out text that has passed all layers: the logits of the original and of the
        compressed model, [batch, seq, vocab], and the tokens [batch, seq]."""
        assert self._original is not None  # the caller evaluates
        assert self._compressed is not None
        with self._clock.phase("read"):
            self._model.load_head()
        of_compressed = self._compressed.finish()
        for original, tokens in self._original.finish():
            compressed, _ = next(of_compressed)
            yield original, compressed, tokens
            del original, compressed

    def close(self) -> None:
        """End whatever is still parked, and take the hooks off the model."""
        for each in (self._calibration, self._original, self._compressed, self._hooks, self._cache):
            if each:
                each.close()
        if self._spill:
            self._spill.close()
