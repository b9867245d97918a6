"""Parity with verl's core functions (installed by `make test` in VENV/verl): losses, gradients, aggregations and advantages to 1e-6.

What differs on purpose is in `GRADIENT_ONLY` (another form with the same gradient) and in the notes at each case.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from loss_streams import Streams, inputs_of, random_streams

from agl_ray.algorithms.aggregation import token_scales
from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.algorithms.base import Tokens
from agl_ray.algorithms.gae import TokenPlaces, lay_episodes
from agl_ray.algorithms.kl import estimate
from agl_ray.algorithms.ppo import ValueInputs, value_loss
from agl_ray.config.algorithm import AlgorithmConfig
from agl_ray.config.kl import Estimator

pytestmark = pytest.mark.slow

# our preset or loss -> (verl's policy loss, further switches of ours, fields of verl's ActorConfig)
LOSSES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "clip": ("vanilla", {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}, {}),
    "gspo": ("gspo", {"clip_low": 0.02, "clip_high": 0.03}, {}),
    "cispo": ("cispo", {"clip_low": 0.9, "clip_high": 4.0}, {}),
    "sapo": ("sapo", {"sapo_tau_positive": 1.0, "sapo_tau_negative": 1.05}, {}),
    "gmpo": ("geo_mean", {"clip_low": 0.4, "clip_high": 0.4}, {}),
    "dppo": ("dppo_tv", {"dppo_bound": 0.2}, {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}),
}
GRADIENT_ONLY = {"dppo": "verl writes sg(ratio) A log pi for our ratio A"}


@pytest.fixture(scope="module")
def core() -> ModuleType:
    """verl.trainer.ppo.core_algos. Not there = the test environment is broken: an error, no skip."""
    place = os.environ.get("AGL_TEST_VERL", str(Path(sys.prefix) / "verl"))
    sys.path.append(place)  # behind everything: its wheel has a package `tests` of its own
    from verl.trainer.ppo import core_algos

    return core_algos  # type: ignore[no-any-return]


def actor_config(**fields: Any) -> Any:
    from verl.workers.config import ActorConfig

    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **fields)


def padded(values: Any, streams: Streams) -> Any:
    """[rows, longest], padded with 0: verl's form."""
    rows = [values[streams["sequence"] == row] for row in range(streams["sequence"].max() + 1)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def whole_rows(seed: int) -> Streams:
    """Streams in which every row has a counted token (verl divides by the number of all rows in geo_mean)."""
    streams = random_streams(seed, rows=9)
    first = np.searchsorted(streams["sequence"], np.arange(9))
    streams["weights"][first] = 1.0
    if seed % 2:
        streams["weights"][:] = 1.0
    return streams


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_policy_losses(core: ModuleType, loss: str, seed: int) -> None:
    name, switches, fields = LOSSES[loss]
    mode = "token-mean" if loss in ("clip", "cispo", "dppo") else "seq-mean-token-mean"
    config = AlgorithmConfig.model_validate(
        {"loss": loss, "correction": "none", "aggregation": mode, **switches}
    )
    streams = whole_rows(seed)
    if loss == "dppo":  # verl takes the policy that sampled as the old one
        streams["engine_logprobs"] = streams["old_logprobs"]
    rows = streams["sequence"]
    streams["scale"] = token_scales(streams["weights"], rows, rows, config)
    inputs = inputs_of(streams)
    ours = make_algorithm(config).loss(inputs).loss
    ours.backward()

    theirs_at = torch.tensor(streams["logprobs"], requires_grad=True)
    ranges = {
        "clip_ratio_low": switches.get("clip_low", 0.2),
        "clip_ratio_high": switches.get("clip_high", 0.28),
    }
    value, _ = core.get_policy_loss_fn(name)(
        old_log_prob=padded(torch.tensor(streams["old_logprobs"]), streams),
        log_prob=padded(theirs_at, streams),
        advantages=padded(torch.tensor(streams["advantages"]), streams),
        response_mask=padded(torch.tensor(streams["weights"]), streams),
        loss_agg_mode=mode,
        config=actor_config(**{**ranges, **fields}),
    )
    value.backward()
    if loss not in GRADIENT_ONLY:
        assert ours.item() == pytest.approx(value.item(), abs=1e-6)
    torch.testing.assert_close(inputs.logprobs.grad, theirs_at.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("share", [0.02, 1.0])
@pytest.mark.parametrize("loss", ["clip_cov", "kl_cov"])
def test_losses_that_choose_tokens(
    core: ModuleType, monkeypatch: pytest.MonkeyPatch, loss: str, share: float
) -> None:
    """One micro-batch, which is what verl chooses from; its random order of eligible tokens is given the order of our draws."""
    bounds = {"cov_low": 0.3, "cov_high": 3.0} if loss == "clip_cov" else {}
    config = AlgorithmConfig.model_validate(
        {"loss": loss, "correction": "none", "cov_share": share, **bounds}
    )
    streams = whole_rows(2)
    del streams["chosen"]
    rows = streams["sequence"]
    streams["scale"] = token_scales(streams["weights"], rows, rows, config)
    inputs = inputs_of(streams)
    algorithm = make_algorithm(config)
    counted = inputs.weights > 0
    draws = torch.rand(len(rows), generator=torch.Generator().manual_seed(3)).double()
    four = (inputs.logprobs.detach(), inputs.old_logprobs, inputs.advantages, draws)
    tokens = Tokens(*(stream[counted] for stream in four))
    chosen = torch.zeros_like(counted)
    chosen[counted] = algorithm.choose(tokens)
    everything = make_algorithm(config.model_copy(update={"cov_share": 1.0})).choose(tokens)
    order = torch.argsort(tokens.draws[everything])
    outputs = algorithm.loss(replace(inputs, chosen=chosen))
    outputs.loss.backward()
    assert 0 < chosen.sum() < len(rows)

    monkeypatch.setattr(torch, "randperm", lambda _: order)
    from verl.workers.config.actor import PolicyLossConfig

    theirs_at = torch.tensor(streams["logprobs"], requires_grad=True)
    cov = {
        "clip_cov_ratio": share,
        "clip_cov_lb": 0.3,
        "clip_cov_ub": 3.0,
        "kl_cov_ratio": share,
        "ppo_kl_coef": 1.0,
    }
    value, _ = core.get_policy_loss_fn(loss)(
        old_log_prob=padded(torch.tensor(streams["old_logprobs"]), streams),
        log_prob=padded(theirs_at, streams),
        advantages=padded(torch.tensor(streams["advantages"]), streams),
        response_mask=padded(torch.tensor(streams["weights"]), streams),
        loss_agg_mode="token-mean",
        config=actor_config(
            clip_ratio_low=0.2, clip_ratio_high=0.28, policy_loss=PolicyLossConfig(**cov)
        ),
    )
    value.backward()
    assert outputs.loss.item() == pytest.approx(value.item(), abs=1e-6)
    torch.testing.assert_close(inputs.logprobs.grad, theirs_at.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators(core: ModuleType, estimator: Estimator) -> None:
    """Values and gradients without our weights; and verl's straight-through `k3+` has the gradient of our weighted k3 and k2."""
    drawn = torch.randn(3, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    reference = drawn[0] - 2
    ours, theirs, through = (drawn[1].clone().requires_grad_() for _ in range(3))
    value = estimate(ours, reference, estimator)
    verls = core.kl_penalty(theirs, reference, estimator)
    torch.testing.assert_close(value, verls, rtol=0, atol=1e-6)
    value.sum().backward()
    verls.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6)
    if estimator == "k1":
        return
    core.kl_penalty(through, reference, "k3+").sum().backward()
    weighted = torch.exp(ours - ours.detach())
    if estimator == "k2":
        weighted = weighted.detach()
    ours.grad = None
    (weighted * estimate(ours, reference, estimator)).sum().backward()
    torch.testing.assert_close(ours.grad, through.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("verls", "advantage"), [("grpo", "group"), ("rloo", "rloo"), ("opo", "opo")]
)
def test_kl_in_the_reward_of_group_baselines(core: ModuleType, verls: str, advantage: str) -> None:
    """verl takes it off token by token and then adds the tokens of a response up: our sum over the unit."""
    rewards, groups, tokens = a_batch(3)
    mask = (torch.arange(int(tokens.max())) < torch.tensor(tokens)[:, None]).double()
    logprobs = -torch.rand(mask.shape, dtype=torch.float64)
    reference = logprobs + 0.3 * torch.sin(7 * logprobs)
    k = core.kl_penalty(logprobs, reference, "k1") * mask
    token_rewards = -0.2 * k
    token_rewards[:, 0] += torch.tensor(rewards)
    extra = {"norm_adv_by_std_in_grpo": False} if verls == "grpo" else {}
    theirs, _ = core.get_adv_estimator_fn(verls)(
        token_level_rewards=token_rewards, response_mask=mask, index=groups, **extra
    )
    penalised = rewards - 0.2 * (estimate(logprobs, reference, "k1") * mask).sum(1).numpy()
    made = make_algorithm(AlgorithmConfig(advantage=advantage))
    got = made.advantages(penalised, groups, tokens)
    np.testing.assert_allclose(got, theirs[:, 0].numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "mode",
    [
        "token-mean",
        "token-sum",
        "seq-mean-token-mean",
        "seq-mean-token-sum",
        "seq-mean-token-sum-norm",
    ],
)
def test_aggregations(core: ModuleType, mode: str) -> None:
    streams = random_streams(4)
    losses = torch.tensor(np.random.default_rng(4).normal(size=len(streams["weights"])))
    config = AlgorithmConfig.model_validate({"aggregation": mode})
    scales = token_scales(streams["weights"], streams["sequence"], streams["sequence"], config)
    theirs = core.agg_loss(
        loss_mat=padded(losses, streams),
        loss_mask=padded(torch.tensor(streams["weights"]), streams),
        loss_agg_mode=mode,
        loss_scale_factor=config.norm_tokens,
    )
    assert float((torch.tensor(scales) * losses).sum()) == pytest.approx(theirs.item(), rel=1e-6)


def advantages_of(core: ModuleType, estimator: str, case: Any, **arguments: Any) -> np.ndarray:
    rewards, groups, tokens = case
    mask = (torch.arange(int(tokens.max())) < torch.tensor(tokens)[:, None]).double()
    rewarded = torch.zeros_like(mask)
    rewarded[:, 0] = torch.tensor(rewards)
    got, _ = core.get_adv_estimator_fn(estimator)(
        token_level_rewards=rewarded, response_mask=mask, index=groups, **arguments
    )
    return got[:, 0].numpy()  # type: ignore[no-any-return]


def a_batch(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups of 4 with different rewards (for groups of one, and of equal rewards, ours is 0 exactly, verl's is not always)."""
    rng = np.random.default_rng(seed)
    return rng.random(48), np.repeat(np.arange(12), 4), rng.integers(1, 9, 48)


@pytest.mark.parametrize(
    ("estimator", "ours", "arguments"),
    [
        ("grpo", {"advantage": "group"}, {"norm_adv_by_std_in_grpo": False}),
        ("rloo", {"advantage": "rloo"}, {}),
        ("opo", {"advantage": "opo"}, {}),
    ],
)
def test_advantages(
    core: ModuleType, estimator: str, ours: dict[str, str], arguments: dict[str, Any]
) -> None:
    case = a_batch(1)
    got = make_algorithm(AlgorithmConfig.model_validate(ours)).advantages(*case)
    theirs = advantages_of(core, estimator, case, **arguments)
    np.testing.assert_allclose(got, theirs, rtol=0, atol=1e-6)


def test_the_standard_deviation_of_a_group_is_the_populations_not_the_samples(
    core: ModuleType,
) -> None:
    """verl divides by the sample's standard deviation (n - 1), the paper and we by the group's own (n)."""
    case = a_batch(2)
    got = make_algorithm(AlgorithmConfig(normalize="group")).advantages(*case)
    theirs = advantages_of(core, "grpo", case, norm_adv_by_std_in_grpo=True)
    np.testing.assert_allclose(got, theirs * np.sqrt(4 / 3), rtol=0, atol=2e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_entropy_of_the_head(core: ModuleType, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks, with its gradient, against verl's entropy of all logits at once."""
    from types import SimpleNamespace

    from verl.utils.torch_functional import entropy_from_logits

    from agl_ray.learner import head

    monkeypatch.setitem(head.CHUNK_LOGITS, "cpu", 7 * 50)
    torch.manual_seed(seed)
    linear = torch.nn.Linear(16, 50, bias=False)
    hidden, taken = torch.randn(1, 40, 16, requires_grad=True), torch.randn(40)
    model = SimpleNamespace(get_output_embeddings=lambda: linear)
    with head.head_gives_logprobs(model, torch.randint(50, (40,)), None, entropy=True):
        ours = linear(hidden)[0, :, 1]
    theirs = entropy_from_logits(linear(hidden)[0])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    leaves = [hidden, linear.weight]
    made, want = (torch.autograd.grad((one * taken).sum(), leaves) for one in (ours, theirs))
    torch.testing.assert_close(made, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.97, 0.8), (0.9, 0.0)])
def test_gae(core: ModuleType, gamma: float, lam: float, seed: int) -> None:
    """Ragged rows with gaps (tool results) that take no time; verl's whitening has the sample's variance, ours the batch's own."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 60, 17)
    mask = np.arange(lengths.max()) < lengths[:, None]
    mask &= rng.random(mask.shape) < 0.6
    mask[:, 0] = True
    values = rng.normal(size=mask.shape)
    scores = rng.normal(size=17)
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
    rewarded = np.zeros(mask.shape)
    rewarded[np.arange(17), last] = scores
    theirs, returns = core.compute_gae_advantage_return(
        *(torch.tensor(array) for array in (rewarded, values, mask.astype(float))),
        gamma=torch.tensor(gamma),
        lam=torch.tensor(lam),
    )

    row, at = np.nonzero(mask)
    shuffled = rng.permutation(len(row))
    row, at = row[shuffled], at[shuffled]
    call = at // 7  # turns
    places = TokenPlaces(row, call, at, np.arange(17), last // 7)
    episodes, index = lay_episodes(places, scores)
    ordered = np.empty(len(row))
    ordered[index] = values[row, at]
    config = AlgorithmConfig.model_validate(
        {"name": "ppo", "gae_gamma": gamma, "gae_lambda": lam, "normalize": "batch"}
    )
    got = make_algorithm(config).critic_advantages(episodes, ordered)
    np.testing.assert_allclose(got.returns[index], returns.numpy()[row, at], rtol=0, atol=1e-6)
    sample = np.sqrt((len(row) - 1) / len(row))
    np.testing.assert_allclose(
        got.advantages[index] * sample, theirs.numpy()[row, at], rtol=0, atol=1e-5
    )
    plain = config.model_copy(update={"normalize": "none"})
    advantages = make_algorithm(plain).critic_advantages(episodes, ordered).advantages[index]
    np.testing.assert_allclose(advantages, (returns.numpy() - values)[row, at], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("clip", [0.2, 10.0])
def test_value_loss(core: ModuleType, mode: str, clip: float) -> None:
    streams = whole_rows(3)
    rng = np.random.default_rng(7)
    rows, size = streams["sequence"], len(streams["weights"])
    values, old, returns = (torch.tensor(rng.normal(size=size)) for _ in range(3))
    config = AlgorithmConfig.model_validate({"aggregation": mode})
    scale, weights = (
        torch.tensor(array)
        for array in (token_scales(streams["weights"], rows, rows, config), streams["weights"])
    )
    ours_at, theirs_at = values.clone().requires_grad_(), values.clone().requires_grad_()
    ours, clipped = value_loss(ValueInputs(ours_at, old, returns, weights, scale), clip)
    theirs, fraction = core.compute_value_loss(
        vpreds=padded(theirs_at, streams),
        returns=padded(returns, streams),
        values=padded(old, streams),
        response_mask=padded(weights, streams),
        cliprange_value=clip,
        loss_agg_mode=mode,
    )
    ours.backward()
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    torch.testing.assert_close(ours_at.grad, theirs_at.grad, rtol=0, atol=1e-6)
    assert ((clipped * weights).sum() / weights.sum()).item() == pytest.approx(float(fraction))
