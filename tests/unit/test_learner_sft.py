"""SFT on chat conversations: exact tokens and mask, errors, micro-batches that change nothing, reproducible training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from agl_ray.learner.sft import (
    SFTConfig,
    SFTStep,
    batches,
    pad,
    token_losses,
    train_sft,
)
from agl_ray.learner.sft_rows import tokenize_rows
from agl_ray.types import InputError

torch = pytest.importorskip("torch")

TEMPLATE = """
{%- for m in messages -%}
<s>{{ m.role }}:{{ m.content }}<e>{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<s>assistant:{%- endif -%}
"""


def make_tokenizer(template: str | None = TEMPLATE) -> Any:
    """One token per byte, `<s>` and `<e>` (end of turn) apart."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<s>", "<e>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<e>", chat_template=template
    )


def make_model(seed: int = 0) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=128,
            tie_word_embeddings=False,
        )
    )


def row(*contents: str) -> dict[str, Any]:
    """A conversation of alternating user and assistant turns."""
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}


ROWS = [row("ab", "cd"), row("a", "b", "cc", "dddd"), row("hello", "you"), row("x", "y" * 30)]


def test_bad_configurations_are_named() -> None:
    with pytest.raises(InputError, match=r"SFTConfig\.lr: expected more than 0"):
        SFTConfig(steps=1, lr=0.0)


def test_batches_cover_every_row_each_epoch() -> None:
    stream = batches(10, 4, seed=0)
    drawn = np.concatenate([next(stream) for _ in range(5)])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))


@pytest.mark.parametrize("tokens", [1, 60, 10_000])
def test_micro_batches_do_not_change_the_losses(tokens: int) -> None:
    rows, model = tokenize_rows(make_tokenizer(), ROWS), make_model()
    parts = pad(rows, tokens)
    assert sum(len(part.ids) for part in parts) == len(rows)
    assert all(part.ids.size <= tokens or len(part.ids) == 1 for part in parts)
    losses = torch.cat([token_losses(model, part)[0] for part in parts]).detach()
    alone = []
    for i in range(len(rows)):
        single = rows.take(np.array([i]))
        ids = torch.from_numpy(single.ids.astype(np.int64))
        logprobs = model(ids[None], use_cache=False).logits[0].log_softmax(-1)
        where = np.flatnonzero(single.weights)
        alone.append(-logprobs[where - 1, ids[where]].detach())
    torch.testing.assert_close(losses.sort().values, torch.cat(alone).sort().values)


def test_losses_equal_those_of_the_packed_rows() -> None:
    from agl_ray.learner.packing import pack, token_logprobs

    rows, model = tokenize_rows(make_tokenizer(), ROWS), make_model()
    padded = torch.cat([token_losses(model, part)[0] for part in pad(rows, 200)])
    packed = torch.cat([token_logprobs(model, part) for part in pack(rows, 200)])
    torch.testing.assert_close(padded.sum(), -packed.sum())


def test_schedule_warms_up_and_falls_linearly() -> None:
    config = SFTConfig(steps=12, lr=1.0, warmup_steps=2, final_lr_share=0.1)
    shares = [config.lr_share(step) for step in range(13)]
    assert shares[:3] == [0.5, 1.0, 1.0]
    assert shares[7] == pytest.approx(0.55)
    assert shares[12] == pytest.approx(0.1)


def weights_after(config: SFTConfig, **more: Any) -> tuple[Any, Any]:
    model = make_model()
    model.eval()
    result = train_sft(model, make_tokenizer(), ROWS, config, **more)
    assert not model.training  # as it was
    return torch.cat([p.detach().flatten() for p in model.parameters()]), result


def test_training_learns_and_is_reproducible() -> None:
    config = SFTConfig(steps=30, lr=1e-2, batch_rows=3, warmup_steps=3)
    seen: list[SFTStep] = []
    first, result = weights_after(config, progress=seen.append)
    assert [done.step for done in seen] == list(range(1, 31))
    assert seen[-1].loss < 0.5 * seen[0].loss
    assert result.steps == 30
    assert result.num_tokens == sum(done.num_tokens for done in seen)
    assert not result.stopped
    assert torch.equal(first, weights_after(config)[0])
    assert not torch.equal(first, weights_after(replace(config, seed=1))[0])


def test_micro_batch_size_does_not_change_an_update() -> None:
    config = SFTConfig(steps=3, lr=1e-3, batch_rows=4)
    small = replace(config, tokens_per_microbatch=1)
    torch.testing.assert_close(
        weights_after(config)[0], weights_after(small)[0], atol=1e-5, rtol=1e-4
    )


def test_stop_ends_it() -> None:
    config = SFTConfig(steps=30, lr=1e-3, batch_rows=2)
    _, result = weights_after(config, stop=lambda step: step == 7)
    assert (result.steps, result.stopped) == (7, True)
