"""How large the parts of a checkpoint are, by their tensors' names: for models of any architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from compression.checkpoint.tensors import StoredTensor

VISION_PREFIXES = ("visual.", "vision_tower.", "vision_model.")
"""What the names of a vision tower's tensors begin with, after an optional "model."."""


def layers(tensors: Mapping[str, StoredTensor], prefix: str, count: int) -> dict[int, list[StoredTensor]]:
    """The tensors of the first `count` layers under `prefix` ("model.layers."), by number of the layer.

    A layer for multi-token prediction is numbered on from the decoder's last one, and is left out by `count`.
    """
    found: dict[int, list[StoredTensor]] = {}
    for name, info in tensors.items():
        number, _, rest = name.removeprefix(prefix).partition(".")
        if rest and name.startswith(prefix) and number.isdecimal() and int(number) < count:
            found.setdefault(int(number), []).append(info)
    return found


def vision_tower(tensors: Mapping[str, StoredTensor]) -> list[StoredTensor]:
    """The tensors of the vision tower; none for a text model."""
    return [info for name, info in tensors.items() if name.removeprefix("model.").startswith(VISION_PREFIXES)]


def stored_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Bytes of the tensors' data on disk."""
    return sum(info.nbytes for info in tensors)


def parameters(tensors: Iterable[StoredTensor]) -> int:
    """How many numbers they hold."""
    return sum(info.spec.elements for info in tensors)
