"""What the gateway's benchmark is made of beside the gateway: a model folder, an engine that answers at once, a plain echo.

The model folder has a byte-level tokenizer of 8,000 tokens over made-up words, Qwen's chat marks and, where asked for, the weights of a
tiny Qwen3, all made on the spot in a second or two. Called by `agl_ray.bench.gateway*`; the echo by uvicorn
(`agl_ray.bench.gateway_parts:echo`). Test alone: tests/unit/test_bench_gateway.py.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import AsyncGenerator
from pathlib import Path

from agl_ray.gateway.engine_api import GenerateChunk, GenerateRequest, GenerateResult
from agl_ray.ops.asgi import Receive, Scope, Send, read_body, respond

END = "<|im_end|>"
VOCABULARY, WORDS = 6500, 3000
LONGEST = 32_768  # tokens of prompt and response
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def words(seed: int, number: int) -> str:
    """Text, the same for the same seed."""
    return " ".join(random.Random(seed).choices(_known_words(), k=number))


@functools.lru_cache(maxsize=1)
def _known_words() -> list[str]:
    fixed, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz"
    return ["".join(fixed.choices(letters, k=fixed.randint(2, 9))) for _ in range(WORDS)]


def make_tokenizer_folder(folder: Path) -> Path:
    """A folder that AutoTokenizer reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([words(seed, 1000) for seed in range(20)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    return folder


def make_model_folder(folder: Path) -> Path:
    """The same with the weights of a Qwen3 of 1.4 M parameters, for vLLM."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    saved = (folder / "config.json").read_text()
    make_tokenizer_folder(folder)
    (folder / "config.json").write_text(saved)
    return folder


class InstantEngine:
    """A Serve deployment in the place of the engine: `max_tokens` ids of text at once, the last one the end of the turn."""

    def __init__(self, folder: str) -> None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        self._ids: list[int] = tokenizer.encode(words(7, 4000)).ids
        self._end = int(tokenizer.encode(END).ids[0])
        self._calls = 0

    def _answer(self, request: GenerateRequest) -> GenerateResult:
        self._calls += 1
        most = request.max_tokens
        start = self._calls % (len(self._ids) - most)
        return GenerateResult(
            response_ids=[*self._ids[start : start + most - 1], self._end],
            logprobs=[-0.25] * most,
            weight_versions=[(0, 1)],
            finish_reason="stop",
        )

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        return self._answer(request)

    async def generate_stream(
        self, request: GenerateRequest
    ) -> AsyncGenerator[GenerateChunk, None]:
        whole = self._answer(request)
        yield GenerateChunk(
            response_ids=whole.response_ids,
            logprobs=whole.logprobs,
            finish_reason=whole.finish_reason,
            weight_versions=whole.weight_versions,
        )


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """A plain ASGI application: any body comes back."""
    if scope["type"] == "http":
        await respond(send, 200, await read_body(receive))
