"""What a checkpoint holds against what its config.json says of it: lm_head, names, positions, other files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from compression.checkpoint.headers import Checkpoint
from compression.errors import Problem, some
from compression.families.decoder import LM_HEAD, Decoder
from compression.families.structure import Vision
from compression.recipe import Calibration

_WRAPPERS = re.compile(r"^module\.|(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into names."""


def tied_as_stored(decoder: Decoder, checkpoint: Checkpoint, warnings: list[Problem]) -> Decoder:
    """The decoder, its lm_head as it is on disk: with a tensor of its own or without."""
    head = f"{LM_HEAD}.weight"
    if decoder.tied != (head in checkpoint.tensors) or decoder.embedding not in checkpoint.tensors:
        return decoder
    if decoder.tied:
        message = (
            f"config.json says that lm_head is the embeddings (tie_word_embeddings), and {head} is in the "
            "checkpoint: that tensor is lm_head, as in Transformers. Unless it holds the embeddings, the "
            "output's config.json says that it is not tied."
        )
    else:
        message = (
            f"config.json does not say that lm_head is the embeddings (tie_word_embeddings), and {head} is "
            "not in the checkpoint: the embeddings are lm_head, and the output's config.json says so."
        )
    warnings.append(Problem("tie_flag_contradicts_checkpoint", message))
    return replace(decoder, tied=not decoder.tied)


def wrapped_names(checkpoint: Checkpoint, vision: Vision, expected: Mapping[str, object]) -> list[Problem]:
    """Tensors that the model has under a name in which a wrapper's is left out."""
    strange = [name for name in checkpoint.tensors if name not in expected and _WRAPPERS.search(name)]
    wrapped = [name for name in strange if vision.in_model(_WRAPPERS.sub("", name)) in expected]
    if not wrapped:
        return []
    prefix = "".join(dict.fromkeys(part for name in wrapped[:1] for part in _WRAPPERS.findall(name)))
    return [
        Problem(
            "names_of_wrapped_model",
            f"{len(wrapped)} tensors are named as of a wrapped model: {wrapped[0]} for "
            f"{_WRAPPERS.sub('', wrapped[0])}.",
            "Save the model without its wrapper (torch.compile, DistributedDataParallel, FSDP), or take "
            f"{prefix!r} out of the names.",
            "/model",
        )
    ]


def position_problems(decoder: Decoder, calibration: Calibration) -> list[Problem]:
    """Samples that are longer than there are embeddings of positions."""
    longest = calibration.max_seq_length
    if not decoder.family.learned_positions or longest <= decoder.positions:
        return []
    return [
        Problem(
            "sequence_too_long",
            f"The model has {decoder.positions} positions (max_position_embeddings), and max_seq_length is "
            f"{longest}.",
            f"Set max_seq_length to at most {decoder.positions}.",
            "/calibration/max_seq_length",
        )
    ]


def position_warnings(decoder: Decoder, calibration: Calibration) -> list[Problem]:
    """Samples that are longer than what rotary frequencies were made for."""
    longest = calibration.max_seq_length
    if decoder.family.learned_positions or longest <= decoder.positions:
        return []
    return [
        Problem(
            "beyond_max_position_embeddings",
            f"max_seq_length is {longest}; the model was made for at most {decoder.positions} positions "
            "(max_position_embeddings). What is learned and measured beyond them is not what the model is "
            "used for.",
        )
    ]


def left_out_warnings(left_out: Iterable[str]) -> list[Problem]:
    """Files and folders that are not copied although they are no weights of the model."""
    names = sorted(left_out)
    adapters = [name for name in names if not name.endswith("/")]
    folders = [name for name in names if name.endswith("/")]
    warnings = []
    if adapters:
        warnings.append(
            Problem(
                "adapter_not_applied",
                f"{some(adapters)} is not copied: an adapter in the model's folder is neither merged nor "
                "written.",
            )
        )
    if folders:
        message = f"Folders that hold a checkpoint of their own are not copied: {some(folders)}."
        warnings.append(Problem("checkpoints_not_copied", message))
    return warnings
