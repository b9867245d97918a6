"""Judging: rewards for attempts whose agent has ended, given by a function or by a model."""

from agl_ray.judge.bench import Bench, JudgeFailed
from agl_ray.judge.case import Case, JudgedCall, Verdict, case_of
from agl_ray.judge.settle import judged

__all__ = ["Bench", "Case", "JudgeFailed", "JudgedCall", "Verdict", "case_of", "judged"]
