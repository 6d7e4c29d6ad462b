"""Tiny random checkpoints and datasets, made in a fraction of a second and the same on every machine.

Everything is written as a user would have it: weights and config by Transformers, a tokenizer by
`tokenizers`, text as a .jsonl file. The values are random; the files are real.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

PECULIARITIES: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2},
    "granite": {"embedding_multiplier": 6.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "cohere": {"use_qk_norm": True, "logit_scale": 0.5},
    "cohere2": {"sliding_window": 8, "sliding_window_pattern": 2, "logit_scale": 0.5},
    "opt": {"ffn_dim": 512, "word_embed_proj_dim": 256},
    "mixtral": {"hidden_size": 128, "intermediate_size": 128, "num_local_experts": 3},
    "qwen3_moe": {
        "hidden_size": 128, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
        "mlp_only_layers": [1],
    },
    "qwen2_moe": {
        "hidden_size": 128, "head_dim": 32, "num_experts": 3, "num_experts_per_tok": 2,
        "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128,
    },
    "olmoe": {
        "hidden_size": 128, "head_dim": 32, "intermediate_size": 128, "num_experts": 3,
        "num_experts_per_tok": 2,
    },
    "deepseek_v3": {
        "hidden_size": 128, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 128, "first_k_dense_replace": 1, "q_lora_rank": 128, "kv_lora_rank": 128,
        "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64, "head_dim": 32,
        "num_key_value_heads": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    },
    "qwen2_5_vl": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1,
    },
    "llama4_text": {
        "hidden_size": 128, "intermediate_size": 128, "intermediate_size_mlp": 256, "num_local_experts": 3,
        "moe_layers": [0], "no_rope_layer_interval": 2, "attention_chunk_size": 16, "floor_scale": 8,
    },
}  # fmt: skip
"""By model type: what makes a tiny model show the family's own features, such as two kinds of masks."""

TOWERS: dict[str, dict[str, Any]] = {
    "llava": {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    },
    "qwen2_5_vl": {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 256,
        "fullatt_block_indexes": [1],
    },
}  # fmt: skip
"""By model type: the vision_config of those that also read images."""

BOS, EOS = "<s>", "</s>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "[{{ message['role'] }}]{{ message['content'] }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def tiny_model(
    folder: Path,
    model_type: str = "llama",
    *,
    layers: int = 2,
    hidden: int = 256,
    intermediate: int = 512,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    vocab: int = 320,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = False,
    shards: int = 1,
    seed: int = 0,
    tokenizer: bool = True,
    **config: Any,
) -> Path:
    """Writes a random checkpoint of `model_type` into `folder` and returns the folder.

    The initial weights have a standard deviation of 1/sqrt(hidden), so that activations and logits are of
    order one and a compression error shows in them. `shards` > 1 splits the tensors, in the order of the
    file, into that many files of about the same size. More fields of the config go in by keyword.
    """
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
        "initializer_range": 1 / math.sqrt(hidden),
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": None,
        **PECULIARITIES.get(model_type, {}),
        **config,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = new_model(model_type, settings, dtype=dtype)
        _randomize_one_dimensional(model)
    model.save_pretrained(folder)
    if shards > 1:
        _split(Path(folder), shards)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def new_model(model_type: str, settings: Mapping[str, Any], **kwargs: Any) -> PreTrainedModel:
    """An untrained model; settings are those of its decoder."""
    if model_type not in TOWERS:
        config = AutoConfig.for_model(model_type, **settings)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **kwargs)
        return model
    parts = {"text_config": dict(settings), "vision_config": dict(TOWERS[model_type])}
    config = AutoConfig.for_model(model_type, **parts)
    model = AutoModelForImageTextToText.from_config(config, **kwargs)
    return model


def load_model(folder: Path, **kwargs: Any) -> PreTrainedModel:
    """A checkpoint as Transformers loads it whole, in evaluation mode."""
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    model: PreTrainedModel = getattr(transformers, architecture).from_pretrained(folder, **kwargs)
    model.eval()
    return model


def tiny_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges: one token a byte (ids 0 to 255), then <s> (256) and </s> (257).

    `bos` says whether encoding a text puts <s> in front, as Llama's tokenizer does.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS, EOS])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, 256)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_dataset(path: Path, documents: int = 40, *, sentences: int = 12, column: str = "text") -> Path:
    """Writes `documents` lines of pseudo-English to a .jsonl file; every document is different."""
    with Path(path).open("w", encoding="utf-8") as file:
        for index in range(documents):
            file.write(json.dumps({column: pseudo_english(index, sentences)}) + "\n")
    return Path(path)


def pseudo_english(seed: int, sentences: int = 12) -> str:
    """About 40 characters a sentence, decided by `seed` alone."""
    subjects = ("the miller", "a river", "the old clock", "my neighbour", "every sailor", "the council")
    verbs = ("grinds", "follows", "remembers", "repairs", "crosses", "counts")
    objects = ("the barley", "a narrow road", "the winter", "some brass wheels", "the bridge", "lanterns")
    endings = ("slowly", "before noon", "without a word", "in the rain", "again")
    state = seed * 7919 + 17
    parts = []
    for _ in range(sentences):
        words = []
        for choices in (subjects, verbs, objects, endings):
            state = (state * 1103515245 + 12345) % 2**31
            words.append(choices[(state >> 16) % len(choices)])
        parts.append(" ".join(words).capitalize() + ".")
    return " ".join(parts)


def single_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Llama 4's stacks of experts as the weights [out, in] of single ones; all else as it is."""
    single = {}
    for name, tensor in tensors.items():
        block, _, stack = name.rpartition(".")
        leaves = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(stack)
        if leaves is None:
            single[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            for leaf, weight in zip(leaves, expert.T.chunk(len(leaves)), strict=True):
                single[f"{block}.{number}.{leaf}.weight"] = weight.contiguous()
    return single


def _randomize_one_dimensional(model: torch.nn.Module) -> None:
    """Norm weights and biases start as ones and zeros, which would hide a wrong or a lost one."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn(parameter.shape).to(parameter.dtype), alpha=0.1)


def _split(folder: Path, shards: int) -> None:
    """One safetensors file into `shards` files and an index, as the Hub has them."""
    tensors = load_file(folder / _SINGLE)
    total = sum(tensor.nbytes for tensor in tensors.values())
    weight_map: dict[str, str] = {}
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    done = 0
    for name, tensor in tensors.items():
        number = min(done * shards // total, shards - 1)
        files[number][name] = tensor
        weight_map[name] = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        done += tensor.nbytes
    if not all(files):
        raise ValueError(f"{len(tensors)} tensors do not fill {shards} shards")
    for number, part in enumerate(files):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2))
    (folder / _SINGLE).unlink()
