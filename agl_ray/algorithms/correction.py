"""Weights for tokens on which learner and engine disagree: k = pi_old / mu. `algorithm.correction`.

    importance      k                                                 decoupled PPO (AReaL), 2505.24298
    tis             min(k, tis_cap)                                   Yao et al. 2025, "Off-policy RL"
    icepop          k inside [icepop_low, icepop_high], else 0        arXiv 2510.18855
    seq-tis         min(K, tis_cap), K = prod_t k of the sequence
    seq-mask        1 where K is inside the band, else 0              MIS; DeepSeek-V3.2, 2512.02556
    geometric-mask  1 where exp(mean_t log k) is in 1 +- geometric_band, else 0
    none            1

Decoupled PPO is E_mu[k min(r A, clip(r) A)], r = pi / pi_old: the clip holds the policy near pi_old, a recent one, however old the one that sampled
is. The estimate has no bias and, for stale tokens, a large variance; the other weights bound it.

Called by algorithms/algorithm.py. Test alone: tests/unit/test_algorithms_correction.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agl_ray.algorithms.base import LossInputs

if TYPE_CHECKING:
    import torch

    from agl_ray.config.algorithm import AlgorithmConfig


def correction(inputs: LossInputs, config: AlgorithmConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight [T], whether it does more than weigh by k [T]: capped or dropped), without gradient."""
    import torch

    with torch.no_grad():
        log_k = inputs.old_logprobs - inputs.engine_logprobs
        if config.correction == "none":
            return torch.ones_like(log_k), torch.zeros_like(log_k, dtype=torch.bool)
        if config.correction.startswith(("seq", "geometric")):
            mean = config.correction == "geometric-mask"
            log_k = inputs.over_sequences(log_k, mean=mean)[inputs.sequence]
        k = torch.exp(log_k)
        if config.correction == "importance":
            return k, torch.zeros_like(k, dtype=torch.bool)
        if config.correction in ("tis", "seq-tis"):
            return k.clamp(max=config.tis_cap), k > config.tis_cap
        if config.correction == "geometric-mask":
            outside = (k - 1).abs() > config.geometric_band
            return (~outside).float(), outside
        outside = (k < config.icepop_low) | (k > config.icepop_high)
        if config.correction == "seq-mask":
            return (~outside).float(), outside
        return torch.where(outside, 0.0, k), outside
