"""A tiny random Qwen3 with a byte-level tokenizer, made on the spot: real weights files, no training, no network.

Used by the tests that need a model folder (engine, gateway, learner). `make(folder)` takes about a second.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCAB = 480

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(folder: Path, *, seed: int = 0, tied: bool = False, **overrides: Any) -> Path:
    """Write model and tokenizer into `folder` (made if needed) and return it. Weights are drawn wide enough
    (std 0.2) that a change of weights changes the logprobs by far more than rounding does."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = Qwen3ForCausalLM(Qwen3Config(**(fields | overrides)))
    model.save_pretrained(folder)
    return folder


def make_tokenizer(folder: Path) -> Any:
    """A byte-level tokenizer (every text round-trips) with Qwen's chat marks; saved into `folder`, returned loaded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def weights(folder: Path) -> list[tuple[str, Any]]:
    """The model's tensors (float32, on CPU) as (name, tensor), in the order of its parameters; a tied head appears once."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    return [(name, tensor.detach()) for name, tensor in model.named_parameters()]


def parameter_count(folder: Path) -> int:
    """Number of parameters, from the safetensors index or header (no torch)."""
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            size = 1
            for dim in entry["shape"]:
                size *= dim
            total += size
    return total
