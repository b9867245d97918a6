"""The section `learner.lora` of the configuration: low-rank adapters (arXiv 2106.09685) trained instead of the model's own weights.

Given, even as `lora: {}`, it is on. There is no dropout: the log-probabilities that the learner trains on are compared with the
engine's, and would differ from them by the dropout's noise. Test alone: tests/unit/test_learner_lora.py.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from agl_ray.config.section import Positive, Section


class LoraConfig(Section):
    rank: Positive = 16
    """Inner size r of an adapter: a layer of [out, in] gets A [r, in] and B [out, r], and acts as W + scale * B A."""
    alpha: Positive = 32
    """The scale is alpha / rank (alpha / sqrt(rank) with `rank_stabilized`)."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) (arXiv 2312.03732), so that large ranks learn as fast as small ones."""
    target_modules: Annotated[list[str], Field(min_length=1)] | None = None
    """Last names of the linear layers that get an adapter, such as q_proj and v_proj; None = every linear layer but the output head.
    A name that fits no linear layer of the model is refused. Experts fused into one tensor are no linear layers."""


class LearnerLoraConfig(LoraConfig):
    """Of a run, which may have several trained roles."""

    per_role: bool = False
    """One adapter for each role of kind train (`roles`), over one base model that never changes, instead of one for all calls. Calls of a role
    are answered with its adapter and train it alone; gradients are clipped for each by itself. Every call must name a role."""
