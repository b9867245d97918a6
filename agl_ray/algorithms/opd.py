"""On-policy distillation: a teacher's log-probabilities of the student's own tokens are an advantage of each token.

    A_t = A(rewards) + coefficient * clip(log teacher_t - log pi_old_t, -bound, bound)

The mean of log pi - log teacher over the student's samples is the reverse KL divergence KL(pi || teacher), whose gradient for the token at
hand is that of -(log teacher - log pi) log pi: GKD's on-policy case (arXiv 2306.13649), MiniLLM's single-step part (2306.08543). A token
answers for its own divergence only, not for that of the tokens after it. The teacher sees what the student saw, so it also judges states
that it would never have come to itself.

A switch (`algorithm.teacher`) and no loss of its own, so it goes with every policy loss, correction and aggregation, and beside every
advantage from rewards; preset `opd` is `advantage: none`, the teacher alone. It is added after `normalize`. pi_old is the learner's own,
so a student that equals its teacher has advantages of 0 up to rounding, whatever the engine's. With a critic the critic learns the rewards only.
To distil from a model folder or a checkpoint without a server: `advantage: none` with `algorithm.kl: {coefficient: 1, reference: FOLDER}`,
the same gradient through a term of the loss.

Called by algorithms/algorithm.py. Test alone: tests/unit/test_algorithms_opd.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from agl_ray.algorithms.base import AdvantageInputs
from agl_ray.algorithms.registry import advantage

if TYPE_CHECKING:
    import torch

    from agl_ray.config.algorithm import AlgorithmConfig
    from agl_ray.config.teacher import TeacherConfig


@advantage("none", baseline="other", reads=())
def none(inputs: AdvantageInputs, config: AlgorithmConfig) -> npt.NDArray:
    """0 [M]: rewards teach nothing."""
    return np.zeros(len(inputs.rewards))


def teacher_advantages(
    old_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, config: TeacherConfig
) -> torch.Tensor:
    """What the teacher adds to each token's advantage [T], without gradient."""
    toward = teacher_logprobs - old_logprobs.detach()
    return config.coefficient * toward.clamp(-config.bound, config.bound)


def teacher_marks(
    old_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, config: TeacherConfig
) -> dict[str, torch.Tensor]:
    """Float or bool [T] each. Their means over the trained tokens are metrics: kl_teacher (k1), teacher_bounded_fraction."""
    away = old_logprobs - teacher_logprobs
    return {"kl_teacher": away, "teacher_bounded_fraction": away.abs() > config.bound}
