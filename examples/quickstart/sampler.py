"""The calculator agent played in one process, many questions at once: how the warm start measures its success.

The agent's own tool and prompts (agent.py), the model's own chat template, but no server: a plain batched sampler with a
key-value cache. Reinforcement learning does not use this file; there the agent talks HTTP to vLLM.
Legend: B conversations, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from agent import MAX_TURNS, SYSTEM_PROMPT, TOOLS, run_tool
from task import is_right
from transformers import DynamicCache

TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>|<tool_call>(.*)", re.DOTALL)


@torch.no_grad()
def sample(
    model: Any,
    prompts: list[list[int]],
    stop_id: int,
    max_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[list[int]]:
    """New token ids for each prompt, `stop_id` included where it came within `max_tokens`. Temperature 0 is greedy."""
    longest = max(map(len, prompts))
    shape = (len(prompts), longest)
    tokens_BT, mask_BT = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for i, prompt in enumerate(prompts):  # padded on the left: all continue in the same column
        tokens_BT[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[i, longest - len(prompt) :] = 1
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    cache, done_B = DynamicCache(config=model.config), torch.zeros(len(prompts), dtype=torch.bool)
    new: list[torch.Tensor] = []
    while len(new) < max_tokens and not done_B.all():
        logits_BV = model(
            input_ids=tokens_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        tokens_BT = _pick(logits_BV, temperature, generator)
        new.append(tokens_BT)
        done_B |= tokens_BT[:, 0] == stop_id
        mask_BT = torch.cat([mask_BT, torch.ones_like(tokens_BT)], 1)
        positions_BT = positions_BT[:, -1:] + 1
    return [_until(row, stop_id) for row in torch.cat(new, 1).tolist()]


def _pick(logits_BV: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    return torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator)


def _until(ids: list[int], stop_id: int) -> list[int]:
    return ids[: ids.index(stop_id) + 1] if stop_id in ids else ids


def parse_message(text: str) -> dict[str, Any]:
    """The assistant message in the model's words, as vLLM's `hermes` parser reads them: broken JSON is no tool call."""
    try:
        calls = [json.loads(closed or left_open) for closed, left_open in TOOL_CALL.findall(text)]
        functions = [{"name": c["name"], "arguments": json.dumps(c["arguments"])} for c in calls]
    except (ValueError, KeyError, TypeError):
        functions = []
    if not functions:
        return {"role": "assistant", "content": text}
    tool_calls = [{"id": "call", "type": "function", "function": each} for each in functions]
    before = text[: text.index("<tool_call>")] or None
    return {"role": "assistant", "content": before, "tool_calls": tool_calls}


def answers(
    model: Any, tokenizer: Any, questions: list[str], *, temperature: float, seed: int
) -> list[str]:
    """The agent's final text for each question; "" where it still asked for a tool in its last turn."""
    generator = torch.Generator().manual_seed(seed)
    system = {"role": "system", "content": SYSTEM_PROMPT}
    talks: list[list[dict[str, Any]]] = [
        [system, {"role": "user", "content": q}] for q in questions
    ]
    finals, waiting = [""] * len(questions), list(range(len(questions)))
    model.eval()
    for _ in range(MAX_TURNS):
        prompts = [
            tokenizer.apply_chat_template(
                talks[i], tools=TOOLS, tokenize=False, add_generation_prompt=True
            )
            for i in waiting
        ]
        ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        new = sample(model, ids, tokenizer.eos_token_id, 40, temperature, generator)
        for i, said in zip(waiting, tokenizer.batch_decode(new), strict=True):
            message = parse_message(said.removesuffix(tokenizer.eos_token))
            talks[i].append(message)
            for call in message.get("tool_calls", []):
                result = run_tool(**call["function"])
                talks[i].append({"role": "tool", "tool_call_id": "call", "content": result})
            finals[i] = message["content"] or ""
        waiting = [i for i in waiting if talks[i][-1]["role"] == "tool"]
        if not waiting:
            break
    return finals


def share_right(model: Any, tokenizer: Any, rows: list[dict[str, Any]], seed: int) -> float:
    """Share of `rows` that the agent answers rightly, sampled at temperature 1."""
    texts = answers(model, tokenizer, [row["question"] for row in rows], temperature=1.0, seed=seed)
    return sum(is_right(text, row["answer"]) for text, row in zip(texts, rows, strict=True)) / len(
        rows
    )
