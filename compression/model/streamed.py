"""A Transformers model of which only a part is real at any time.

The model is built without storage (meta device). The part outside the decoder layers is made real once; each
decoder layer is loaded, used and dropped. Everything that leans on Transformers' half-private API is in this
file, and the pinned version is in pyproject.toml.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ContextManagers

from compression.boundary import foreign
from compression.checkpoint.headers import Checkpoint
from compression.checkpoint.reader import read_tensors
from compression.errors import NumericalError, PlanError, Problem
from compression.families.families import FAMILIES
from compression.math.finite import all_finite
from compression.model.experts import unfuse
from compression.model.state import forget_between_calls, stateful, without_storage, without_values

HEAD = "lm_head"

_CONFIG = "Correct config.json, or download the model again."


class StreamedModel:
    """A causal language model in evaluation mode, one decoder layer of which is real at a time; what it reads
    images with never is.

    layers_prefix: name of the list of decoder layers, with a dot at its end. compute_dtype: dtype of all
    parameters while they are real, whatever dtype the checkpoint stores.
    """

    def __init__(
        self, checkpoint: Checkpoint, layers_prefix: str, *, device: str, compute_dtype: torch.dtype
    ) -> None:
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self.compute_dtype = compute_dtype
        family = FAMILIES[checkpoint.config["model_type"]]
        self.module = _build_empty(checkpoint.config, family.architecture, compute_dtype)
        self.layers = list(self.module.get_submodule(layers_prefix.removesuffix(".")).children())
        if family.sparse:
            for layer in self.layers:
                unfuse(layer, family.sparse.experts)
        self.head = self.module.get_submodule(HEAD)
        if family.counts_positions:
            self.module.register_forward_pre_hook(_with_positions, with_kwargs=True)
        self._layers_prefix = layers_prefix
        self._tower = family.vision.modules
        self._embedding = family.embedding

    def __len__(self) -> int:
        return len(self.layers)

    def layer_of(self, module: str) -> int:
        """Number of the decoder layer that a module lies in."""
        return int(module.removeprefix(self._layers_prefix).split(".", 1)[0])

    def linears(self) -> dict[str, nn.Linear]:
        """Every linear of the decoder by its name in the model, in the order of definition."""
        linears = {name: m for name, m in self.module.named_modules() if isinstance(m, nn.Linear)}
        return {name: m for name, m in linears.items() if not name.startswith(self._tower)}

    def tower(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters that read images, by name. They are never made real."""
        named = self.module.named_parameters()
        return {name: tuple(p.shape) for name, p in named if name.startswith(self._tower)}

    def trace(self, producers: Iterable[str] = ()) -> tuple[list[list[str]], dict[str, set[str]]]:
        """Which linears read one tensor, in the order in which they run; which read each producer's result.

        Found by running the empty model's own forward on tensors without storage.
        """
        calls: list[tuple[str, Tensor]] = []  # holds every input, so that no identity is used twice
        results: dict[str, Tensor] = {}

        def at_linear(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _module, args: calls.append((name, args[0]))

        def at_producer(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            return lambda _module, _args, result: results.update({name: result})

        handles = [m.register_forward_pre_hook(at_linear(name)) for name, m in self.linears().items()]
        for name in producers:
            handles.append(self.module.get_submodule(name).register_forward_hook(at_producer(name)))
        ids = torch.zeros(1, 4, dtype=torch.int64, device="meta")
        mask = torch.zeros(1, 1, 4, 4, dtype=self.compute_dtype, device="meta")  # 4-D: used as it is
        with (
            foreign(
                "config_invalid", "Transformers cannot run the model of config.json", _CONFIG, calls_ours=True
            ),
            without_storage(stateful(self.module, self._tower).values()),
        ):
            self.module(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
        groups: dict[int, list[str]] = {}
        for name, tensor in calls:
            groups.setdefault(id(tensor), []).append(name)
        readers = {name: set(groups.get(id(result), ())) for name, result in results.items()}
        return list(groups.values()), readers

    def load_embeddings(self) -> None:
        """Make real all that runs before the first layer, and what is small: norms and rotary buffers.

        Raises:
            PlanError: `plan_mismatch`, where the model keeps a tensor that none of this makes real.
        """
        model: Any = self.module  # the half-private part of Transformers' interface has no types
        meta_buffers = [buffer for buffer in model.buffers() if buffer.is_meta]
        model._move_missing_keys_from_meta_to_device([], {"": self.device}, None, None)
        for tensor in [*model.parameters(), *meta_buffers]:
            tensor._is_hf_initialized = True  # only what no checkpoint holds is initialised
        model.initialize_weights()
        self._load(self._outside())
        forget_between_calls(stateful(self.module, self._tower).values())
        later = (self._layers_prefix, f"{HEAD}.")
        if missing := without_values(self.module, loaded_later=later, outside=self._tower):
            raise _missing(missing[0])

    def drop_embeddings(self) -> None:
        """Give back the embeddings, which no batch reads again once it has reached the first layer."""
        embeddings = {id(p) for p in self.module.get_input_embeddings().parameters()}
        self._drop([name for name, p in self.module.named_parameters() if id(p) in embeddings])

    def load_head(self) -> None:
        """Make lm_head real: that on disk, and the embeddings where there is none, whatever config.json says
        of it (docs/adr/0038-what-is-on-disk-is-the-model.md)."""
        name = f"{HEAD}.weight"
        self._load([name], {} if name in self.checkpoint.tensors else {name: self._embedding})

    def load_layer(self, index: int) -> None:
        """Make one decoder layer real.

        Raises:
            NumericalError: `non_finite_weights`, naming the tensor.
            SourceError: the file cannot be read, or is no longer the one that was planned.
        """
        self._load(self._in_layer(index))

    def drop_layer(self, index: int) -> None:
        """Give back a layer's parameters; buffers that no checkpoint holds stay."""
        self._drop(self._in_layer(index))

    def weights(self, names: Iterable[str]) -> list[Tensor]:
        """The weights [out, in] of named linears, which must be real."""
        return [self.module.get_parameter(f"{name}.weight") for name in names]

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the weights of named linears; values are converted to the compute dtype."""
        self.set_parameters({f"{name}.weight": weight for name, weight in weights.items()})

    def set_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Replace parameters, by their full names; values are converted to the compute dtype."""
        for name, value in parameters.items():
            self._assign(name, value.to(self.device, self.compute_dtype))

    def _in_layer(self, index: int) -> list[str]:
        """A layer's parameters, and the buffers that checkpoints hold."""
        return [f"{self._layers_prefix}{index}.{name}" for name in self.layers[index].state_dict()]

    def _outside(self) -> list[str]:
        """Parameters of the decoder outside its layers, without lm_head."""
        names = [name for name, _ in self.module.named_parameters(remove_duplicate=False)]
        return [n for n in names if not n.startswith((self._layers_prefix, f"{HEAD}.", *self._tower))]

    def _load(self, names: Iterable[str], on_disk: Mapping[str, str] | None = None) -> None:
        for name in names:
            key = (on_disk or {}).get(name, name)
            if key not in self.checkpoint.tensors:
                raise _missing(name)
            tensor = read_tensors(self.checkpoint, [key])[key]
            if not all_finite(tensor):
                raise NumericalError(
                    "non_finite_weights",
                    f"{key} holds NaN or Inf.",
                    "Repair or download the checkpoint again: nothing was written for this layer.",
                )
            self._assign(name, tensor.to(self.device, self._dtype_of(name)))

    def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            module, _, leaf = name.rpartition(".")
            tensor = getattr(self.module.get_submodule(module), leaf)
            self._assign(name, torch.empty_like(tensor, device="meta"))

    def _dtype_of(self, name: str) -> torch.dtype:
        """That of all parameters, but for those that Transformers never rounds."""
        never = self.module._keep_in_fp32_modules_strict or ()
        return torch.float32 if any(part in name for part in never) else self.compute_dtype

    def _assign(self, name: str, tensor: Tensor) -> None:
        """Give a parameter or buffer new storage; that of another device cannot be put into the old one."""
        path, _, leaf = name.rpartition(".")
        module = self.module.get_submodule(path)
        if leaf in module._buffers:
            module.register_buffer(leaf, tensor)
        else:
            module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


def _with_positions(
    _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call of a model with the positions of its tokens, those after what a cache holds."""
    if kwargs.get("position_ids") is not None:
        return args, kwargs
    tokens, cache = kwargs["input_ids"], kwargs.get("past_key_values")
    first = 0 if cache is None else cache.get_seq_length()
    positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)
    return args, {**kwargs, "position_ids": positions.expand_as(tokens)}


def _missing(name: str) -> PlanError:
    return PlanError(
        Problem(
            "plan_mismatch",
            f"The model has a parameter that the checkpoint does not: {name}.",
            "The checkpoint is incomplete, or its config.json belongs to another model.",
        )
    )


def _build_empty(stated: Mapping[str, Any], architecture: str, compute_dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint's config, every tensor on the meta device."""
    with foreign("config_invalid", "Transformers cannot read config.json", _CONFIG):
        config = CONFIG_MAPPING[stated["model_type"]].from_dict(deepcopy(dict(stated)))
    cls: Any = getattr(transformers, architecture)
    config._attn_implementation = "sdpa" if cls._supports_sdpa else "eager"  # Gemma 2 soft-caps its scores
    for part in config.sub_configs:
        getattr(config, part).dtype = compute_dtype  # parts are built in the dtypes that their configs state
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        _return_logits_only(part)
    with (
        foreign("config_invalid", f"Transformers makes no {architecture} of config.json", _CONFIG),
        ContextManagers(cls.get_init_context(compute_dtype, False, False, None)),
    ):
        model: PreTrainedModel = cls(config)
    model.train(False)
    return model.requires_grad_(False)


def _return_logits_only(config: PreTrainedConfig) -> None:
    """What config.json may ask of every forward besides, or in place of, an object that holds the logits."""
    config.return_dict = True
    config.output_hidden_states = False
    config.output_attentions = False
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False
