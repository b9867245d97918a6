"""The head in chunks: equal to all logits at once in values and gradients, and no tensor of tokens x vocabulary is ever there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agl_ray.learner import head
from agl_ray.learner.head import head_gives_logprobs

TOKENS, HIDDEN, VOCABULARY = 37, 16, 60


class Case:
    """A head, hidden states, targets, temperatures and what the loss takes of each output."""

    def __init__(self, *, bias: bool = False, scaled: bool = True, grad: bool = True) -> None:
        torch.manual_seed(3)
        self.linear = torch.nn.Linear(HIDDEN, VOCABULARY, bias=bias)
        self.hidden = torch.randn(1, TOKENS, HIDDEN).requires_grad_(grad)
        self.targets = torch.randint(VOCABULARY, (TOKENS,))
        self.scale = 0.5 + torch.rand(TOKENS) if scaled else None
        self.taken = torch.randn(TOKENS, 2)
        self.model = SimpleNamespace(get_output_embeddings=lambda: self.linear)

    def chunked(self, entropy: bool) -> torch.Tensor:
        with head_gives_logprobs(self.model, self.targets, self.scale, entropy=entropy):
            return self.linear(self.hidden)[0]

    def at_once(self, entropy: bool) -> torch.Tensor:
        logits = self.linear(self.hidden)[0]
        if self.scale is not None:
            logits = logits * self.scale[:, None]
        logprobs = torch.log_softmax(logits, 1)
        chosen = logprobs.gather(1, self.targets[:, None])
        both = torch.cat([chosen, -(logprobs.exp() * logprobs).sum(1, keepdim=True)], 1)
        return both if entropy else both[:, :1]

    def gradients(self, values: torch.Tensor) -> list[torch.Tensor]:
        leaves = [self.hidden, *self.linear.parameters()]
        taken = self.taken[:, : values.shape[1]]
        return list(torch.autograd.grad((values * taken).sum(), leaves))


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("more", [{}, {"bias": True}, {"scaled": False}])
@pytest.mark.parametrize("chunk", [1, 7 * VOCABULARY, 10**6])
def test_chunks_equal_all_at_once(
    entropy: bool, more: dict[str, bool], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head.CHUNK_LOGITS, "cpu", chunk)
    case = Case(**more)
    got, want = case.chunked(entropy), case.at_once(entropy)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    for mine, theirs in zip(case.gradients(got), case.gradients(want), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_the_gradient_is_that_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.CHUNK_LOGITS, "cpu", 5 * VOCABULARY)
    case = Case()
    values, step = case.chunked(True), 1e-2
    gradient = case.gradients(values)[0]
    direction = torch.randn_like(gradient)
    ends = []
    for sign in (1, -1):
        case.hidden = case.hidden.detach() + sign * step * direction
        ends.append((case.chunked(True).double() * case.taken).sum())
        case.hidden = case.hidden - sign * step * direction
    slope = (ends[0] - ends[1]) / (2 * step)
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-3)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = func(*args, **(kwargs or {}))
        for one in given if isinstance(given, (tuple, list)) else [given]:
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return given


def test_logits_of_all_tokens_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.CHUNK_LOGITS, "cpu", 5 * VOCABULARY)
    case = Case()
    with Largest() as forward:
        values = case.chunked(True)
    with Largest() as backward:
        case.gradients(values)
    own = VOCABULARY * HIDDEN  # the head's weight and its gradient, more than a chunk's logits here
    assert (forward.elements, backward.elements) == (own, own)
    with Largest() as plain:
        case.at_once(True)
    assert plain.elements == TOKENS * VOCABULARY  # the instrument sees what it is there for


def test_a_frozen_head_gets_no_gradient_and_hidden_states_do() -> None:
    case = Case()
    case.linear.requires_grad_(False)
    (gradient,) = torch.autograd.grad(case.chunked(False).sum(), [case.hidden])
    assert gradient.abs().max() > 0


def test_bfloat16_under_autocast_is_close_and_gradients_stay_float32() -> None:
    case = Case()
    want = case.at_once(True)
    with torch.autocast("cpu", torch.bfloat16):
        got = case.chunked(True)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=0.03, rtol=0)
    assert not torch.equal(got, want)
    for mine, theirs in zip(case.gradients(got), case.gradients(want), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, atol=0.1, rtol=0.05)


def test_the_head_is_left_as_it_was() -> None:
    case = Case()
    before = case.linear(case.hidden)
    with pytest.raises(ZeroDivisionError), head_gives_logprobs(case.model, case.targets, None):
        _ = 1 / 0
    assert torch.equal(case.linear(case.hidden), before)
