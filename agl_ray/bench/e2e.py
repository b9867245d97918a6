"""The loop against the ideal: how much of the time would engine and learner need if nothing were between them?

Trains the quickstart agent for a few steps through the whole system, and in the same run, on the same calls and rows, measures

- the engine alone: the very prompts and response lengths of the run's calls, handed to one vLLM engine all at once, in its own process;
- the learner alone: the very batches of the run, trained again one after the other with their rows already laid out.

    ideal seconds   = tokens generated / engine tokens/s alone + tokens trained / learner tokens/s alone
    share_of_ideal  = ideal seconds / seconds of the loop's steps

What is left is what the house adds: HTTP, agents, rendering, journal, layout of rows, weight sync, waiting. The keys of the result
are in `KEYS`. Called by `agl_ray.cli.bench`; run alone: `agl-ray bench e2e --quick`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agl_ray.config.load import load_config
from agl_ray.ops.display import make_display
from agl_ray.ops.metrics import read_metrics
from agl_ray.ops.run_folder import make_run_folder
from agl_ray.trainer import Trainer
from agl_ray.types import RunError
from agl_ray.waits import get

if TYPE_CHECKING:
    from actors.session import RunSession
    from agl_ray.config import RunConfig
    from agl_ray.ops.ledger import Ledger

KEYS = {
    "share_of_ideal": "ideal seconds / loop seconds (1 = nothing lost between engine and learner)",
    "steps": "training steps measured (the first one, which warms up, is left out)",
    "loop_seconds": "seconds of those steps, from the opening of the slots to the next opening",
    "ideal_seconds": "what engine and learner alone need for the same tokens, one after the other",
    "engine_ideal_seconds": "the engine's part of it",
    "learner_ideal_seconds": "the learner's part of it",
    "rollout_seconds": "seconds the loop waited for batches",
    "update_seconds": "seconds of updates",
    "sync_seconds": "seconds of weight updates",
    "other_seconds": "the rest of the loop: journal, position, metrics",
    "rollout_lost_seconds": "rollout_seconds - engine_ideal_seconds: HTTP, agents, rendering, journal of calls",
    "update_lost_seconds": "update_seconds - learner_ideal_seconds: reading spans, laying out rows",
    "engine_tokens_per_s": "response tokens per second of the engine alone",
    "learner_tokens_per_s": "tokens in the forward pass per second of the learner alone",
    "tokens_generated": "response tokens of the measured steps",
    "tokens_forward": "tokens that went through the learner in them",
    "calls": "model calls of the measured steps",
    "calls_per_s": "calls / rollout_seconds",
    "tokens_per_call": "response tokens per call",
    "rollouts_per_s": "rollouts / rollout_seconds",
}
CONFIG = Path("configs/quickstart.yaml")
QUICK = [  # nothing has to be made first: random weights, and an agent whose reward needs no skill
    "model.make=examples/quickstart/base_model.py:make_untrained",
    "agent=agl_ray.bench.chatter:chatter",
    "data.train=agl_ray.bench.chatter:rows",
    "data.val=agl_ray.bench.chatter:rows",
    "data.fields=[question]",
    "rollout.groups_per_step=4",
    "engine.max_model_len=256",
    "engine.tool_parser=null",  # its agent has no tools; loading vLLM's parsers takes the gateway seconds
    "learner.max_row_tokens=256",
]
QUICK_TOKENS = 32  # an answer; the price of a call is the same for a short one, so short ones have a smaller share
CALLS_ALONE = 64  # calls of the engine's measurement
ROUNDS = 2  # of each measurement alone; the better one counts (--quick: one)


def run_e2e(
    quick: bool = False, config_path: Path = CONFIG, tokens: int = QUICK_TOKENS
) -> dict[str, Any]:
    """Measure; keys as in `KEYS`. quick: 2 steps of a two-call agent on an untrained model of the quickstart's shape, which answers
    with `tokens` tokens; else 9 steps of the quickstart itself (its base model is made first where the cache has it not), whose
    answers are about 15 tokens long.

    Writes its run folder under the system's temp folder.
    """
    from actors.session import RunSession

    with tempfile.TemporaryDirectory(prefix="agl-bench-") as runs:
        overrides = [
            f"runs_dir={runs}",
            f"train.steps={3 if quick else 10}",
            f"validation.rows={2 if quick else 32}",
            "validation.every=0",
            "name=bench",
        ]
        if quick:
            overrides += [*QUICK, f"rollout.max_tokens={tokens}"]
        config = load_config(config_path, overrides)
        folder = make_run_folder(config)
        display = make_display()
        with display, RunSession(config, folder, display) as session:
            base = config_path.parent.resolve()
            return _measure(session, config, base, 1 if quick else ROUNDS)


def _measure(session: RunSession, config: RunConfig, base: Path, rounds: int) -> dict[str, Any]:
    trainer = Trainer(config, config_folder=base, display=session.display)
    rows = trainer.rows("data.train", config.data.train)
    held_out = trainer.rows("data.val", config.data.val)
    session.start_services()
    model = trainer.model(session)
    controller = session.start_controller(config.agent, rows, held_out, base, model)
    endpoint = session.start_serving(controller, model)
    facts = trainer.follow(session, controller, endpoint)
    ledger: Ledger = facts["ledger"]
    learner = get(controller.measure_learner.remote(rounds), on="the learner alone", seconds=300)
    engine = _engine_alone(session, ledger, rounds)
    return _result(read_metrics(session.folder)[1:], engine, float(learner))


def _engine_alone(session: RunSession, ledger: Ledger, rounds: int) -> float:
    """Response tokens per second of one engine, on prompts and lengths of the run's own calls; the best of the rounds."""
    from agl_ray.bench.calls import recorded_calls

    requests = recorded_calls(session.store, ledger, CALLS_ALONE)
    rates = []
    for _ in range(rounds):
        tokens, seconds = session.time_engine(requests)
        rates.append(tokens / seconds)
    return max(rates)


def _result(rows: list[dict[str, Any]], engine: float, learner: float) -> dict[str, Any]:
    """The keys of KEYS from the steps' metrics and the two rates (tokens per second)."""
    if not rows:
        raise RunError("the benchmark run has no measured steps")

    def total(name: str) -> float:
        return float(sum(row.get(name) or 0.0 for row in rows))

    generated, forward = total("tokens_of_batch"), total("tokens_forward")
    loop = total("seconds_step")
    rollout, update, sync = (total(f"seconds_{name}") for name in ("rollout", "update", "sync"))
    engine_ideal, learner_ideal = generated / engine, forward / learner
    ideal = engine_ideal + learner_ideal
    return {
        "share_of_ideal": ideal / loop,
        "steps": len(rows),
        "loop_seconds": loop,
        "ideal_seconds": ideal,
        "engine_ideal_seconds": engine_ideal,
        "learner_ideal_seconds": learner_ideal,
        "rollout_seconds": rollout,
        "update_seconds": update,
        "sync_seconds": sync,
        "other_seconds": loop - rollout - update - sync,
        "rollout_lost_seconds": rollout - engine_ideal,
        "update_lost_seconds": update - learner_ideal,
        "engine_tokens_per_s": engine,
        "learner_tokens_per_s": learner,
        "tokens_generated": generated,
        "tokens_forward": forward,
        "calls": total("calls"),
        "calls_per_s": total("calls") / rollout,
        "tokens_per_call": generated / total("calls"),
        "rollouts_per_s": total("rollouts") / rollout,
    }
