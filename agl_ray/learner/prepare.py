"""One training step laid out on rank 0: spans and rewards in, one payload of packed micro-batches per rank out.

Order matters (contracts 1 and 6): advantages from all members, then rows are dropped. With an adapter per role (`learner.lora.per_role`) a
micro-batch holds rows of one role, and the i-th of every rank is of the same one, since FSDP's collectives are of the tensors that have
gradients; what a token counts is taken over all rows as ever. Called by
actors/learner.py and by tests without Ray. Pure numpy; test it alone with tests/unit/test_learner_step.py.
Legend: U units of credit, R rows, N tokens of all rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from agl_ray.algorithms.base import AdvantageInputs, Episodes
from agl_ray.algorithms.gae import TokenPlaces, lay_episodes
from agl_ray.algorithms.overlong_shaping import overlong_penalty
from agl_ray.config.trajectory import TrajectoryConfig
from agl_ray.learner.layouts import LAYOUTS, Layout
from agl_ray.learner.packing import Packed, pack
from agl_ray.trajectory.batch import TrainBatch
from agl_ray.trajectory.calls import Calls
from agl_ray.trajectory.credit import Credit, Units
from agl_ray.trajectory.overlong import fit
from agl_ray.trajectory.ragged import Array, Rows
from agl_ray.trajectory.rows import build_rows
from agl_ray.trajectory.tree import Tree
from agl_ray.types.errors import RunError

if TYPE_CHECKING:
    from agl_ray.algorithms.algorithm import Algorithm
    from agl_ray.config.models import LearnerConfig
    from agl_ray.learner.teacher import Scores


ALL_SIGNAL = {"zero_signal_groups": 0.0, "zero_signal_unit_groups": 0.0}
"""With a critic every group may be learnt from; its advantages are of tokens, and learner/critic.py counts them. So it is with a teacher."""

Score = Callable[[Rows], "Scores"]
"""A teacher asked for the log-probabilities of all rows of a step (learner/teacher.py)."""


@dataclass(frozen=True, slots=True)
class Update:
    """One optimiser update on one rank: its micro-batches, as many on every rank."""

    micros: list[Packed]


@dataclass(frozen=True, slots=True)
class Payload:
    """One rank's work for step `step`. `stats` are counts over the whole batch, the same on every rank. kept: what the advantage function
    keeps from this step on. units: where the advantages are still to be made (`Algorithm.late_advantages`, `with_advantages`); then a column
    `unit` says which of them each token belongs to, U where to none. episodes: with a critic, those of the whole batch; then a column `place`
    says where in them each token is, and `advantages` are 0 until the critic has made them."""

    step: int
    updates: list[Update]
    stats: Mapping[str, float]
    kept: Mapping[str, float]
    units: Units | None = None
    episodes: Episodes | None = None


def lay_out(
    spans: pa.Table,
    batch: TrainBatch,
    algorithm: Algorithm,
    config: LearnerConfig,
    *,
    world_size: int,
    seed: int,
    trajectory: TrajectoryConfig | None = None,
    credit: Credit | None = None,
    kept: Mapping[str, float] | None = None,
    score: Score | None = None,
) -> list[Payload]:
    """The payload of each rank.

    spans: of the attempts of `batch.attempts`, as `store.read_spans` gives them. The scales of the tokens are taken over the whole batch,
    rows of advantage 0 included, times the number of updates. `seed` and the step choose which rollouts go into which update where there
    are several. trajectory, credit: None for the defaults. kept: what the advantage function kept from the step before. score: with
    `algorithm.teacher`, who is asked; a row that it cannot score is dropped, after the advantages are taken.
    """
    started = time.perf_counter()
    trajectory = trajectory or TrajectoryConfig()
    built = build_rows(spans, batch.attempts, trajectory)
    units = (credit or Credit()).units(built.calls, spans, batch)
    _check_decidable(units, batch, algorithm)
    units, punished = _punished(units, algorithm)
    after = dict(kept or {})
    late = algorithm.late_advantages and not algorithm.needs_critic
    advantages_U = (
        np.zeros(len(units.reward)) if late else algorithm.advantages_of(_inputs(units, after))
    )
    rows, unrewarded = _only_of_units(built.rows, units)
    rows, stay, dropped = fit(rows, config.max_row_tokens, trajectory)
    if algorithm.config.teacher is not None:
        rows, stay, unscored = _scored(rows, stay, score)
        dropped |= unscored
    episodes = None
    if algorithm.needs_critic:
        rows, episodes = _with_places(rows, units, algorithm.config.gae_over)
    row, attempt = rows.row_of_token, built.attempt[stay]
    scales = algorithm.scales(rows.weights, attempt[row], row)
    unit = units.of_call[rows.columns["call"]]
    rows = _with_streams(rows, np.append(advantages_U, 0.0)[unit], scales)
    if late:
        unit_of_token = np.where(unit < 0, len(units.reward), unit)
        rows = replace(rows, columns={**rows.columns, "unit": unit_of_token})
    stats = {
        **built.counts(),
        **units.counts,
        **punished,
        **dropped,
        **_signal(advantages_U, units, len(batch.groups), algorithm),
        "groups": float(len(batch.groups)),
        "rollouts": float(len(batch.members)),
        "tokens_dropped_unrewarded": unrewarded,
        "tokens_of_batch": float(rows.weights.sum()),
    }
    if algorithm.needs_choice:
        draws = np.random.default_rng([seed, batch.step, 1]).random(len(rows.ids))
        rows = replace(rows, columns={**rows.columns, "draw": draws})
    chosen = _to_learn_from(rows, algorithm)
    rows, attempt = rows.take(chosen), attempt[chosen]
    parts = _split(attempt, config.minibatches, np.random.default_rng([seed, batch.step]))
    roles: list[str | None] = [None] * len(rows)
    if config.lora is not None and config.lora.per_role:
        roles = _roles_of_rows(rows, built.calls)
    packing = _Packing(LAYOUTS[trajectory.rows], world_size, config.tokens_per_microbatch)
    updates, forward = _pack_alike(_with_share(rows, len(parts)), parts, roles, packing)
    stats |= {"rows": float(len(rows)), **forward, **_ages(rows, batch.step - 1)}
    stats["seconds_layout"] = time.perf_counter() - started - stats.get("seconds_teacher", 0.0)
    of_all = (stats, after, units if late else None, episodes)
    return [
        Payload(batch.step, [update[rank] for update in updates], *of_all)
        for rank in range(world_size)
    ]


def with_advantages(payload: Payload, penalty: Array, algorithm: Algorithm) -> Payload:
    """A late payload with its advantages, of rewards less `penalty` [U]. On every rank the same, since all have all units."""
    if payload.units is None:
        raise ValueError("Payload.units: expected the units of a late layout, got none")
    units = replace(payload.units, reward=payload.units.reward - penalty)
    kept = dict(payload.kept)
    advantages_U = algorithm.advantages_of(_inputs(units, kept))
    of_unit = np.append(advantages_U, 0.0).astype(np.float32)
    updates = [
        Update([_of_units(micro, of_unit) for micro in update.micros]) for update in payload.updates
    ]
    stats = {
        **payload.stats,
        **_signal(advantages_U, units, int(payload.stats["groups"]), algorithm),
        "kl_penalty": float(penalty.mean()) if len(penalty) else 0.0,
    }
    return Payload(payload.step, updates, stats, kept)


def _of_units(micro: Packed, advantages: Array) -> Packed:
    there = np.where(micro.weights > 0, advantages[micro.columns["unit"]], np.float32(0.0))
    return replace(micro, columns={**micro.columns, "advantages": there})


def _inputs(units: Units, kept: dict[str, float]) -> AdvantageInputs:
    return AdvantageInputs(
        rewards=units.reward,
        group=units.group,
        tokens=units.tokens,
        rollout=units.member,
        role=units.role,
        turn=units.turn,
        state=units.state,
        kept=kept,
    )


def _check_decidable(units: Units, batch: TrainBatch, algorithm: Algorithm) -> None:
    """Which groups had no signal was decided by their rollouts' own rewards; RunError where those are not all there is."""
    parts = int(units.counts["rewards_of_parts"])
    if algorithm.config.zero_signal == "refill" and parts:
        raise RunError(
            f"step {batch.step}: algorithm.zero_signal refill decides by the rewards of whole rollouts, and {parts} rewards of parts (calls, turns, "
            "tags, roles) were given too; give them to the rollout or say algorithm.zero_signal: keep"
        )


def _punished(units: Units, algorithm: Algorithm) -> tuple[Units, dict[str, float]]:
    """The units with rewards less the punishment for their lengths, and its metrics; as they are where there is none (`algorithm.overlong_tokens`)."""
    if algorithm.config.overlong_tokens is None:
        return units, {}
    penalty = overlong_penalty(units.tokens, algorithm.config)
    counts = {
        "overlong_penalty": float(-penalty.mean()) if len(penalty) else 0.0,
        "overlong_share": float((penalty < 0).mean()) if len(penalty) else 0.0,
    }
    return replace(units, reward=units.reward + penalty), counts


def _only_of_units(rows: Rows, units: Units) -> tuple[Rows, float]:
    """Rows whose tokens without a unit (their rollout lacks a reward that counts) are context; and how many these are."""
    without = (units.of_call[rows.columns["call"]] < 0) & (rows.weights != 0)
    if not without.any():
        return rows, 0.0
    return replace(rows, weights=np.where(without, 0, rows.weights)), float(without.sum())


def _scored(rows: Rows, stay: Array, score: Score | None) -> tuple[Rows, Array, dict[str, float]]:
    """The rows that the teacher scored, with float32 column `teacher_logprobs`; which rows of all they are; and the step's metrics."""
    if score is None:
        raise ValueError("score: expected the teacher of algorithm.teacher, got none")
    made = score(rows)
    rows = replace(rows, columns={**rows.columns, "teacher_logprobs": made.logprobs})
    there = np.flatnonzero(made.scored)
    return rows.take(there), stay[there], made.counts


def _with_places(rows: Rows, units: Units, over: str) -> tuple[Rows, Episodes]:
    """The episodes of the trained tokens, and the rows with int32 column `place`, where a token is in them; -1 where it is not trained."""
    tokens = np.flatnonzero(rows.weights)
    call = rows.columns["call"][tokens]
    line = units.member if over == "rollout" else np.arange(len(units.reward))
    of_units = np.flatnonzero(units.of_call >= 0)
    last = np.full(len(line), -1, np.int64)
    np.maximum.at(last, units.of_call[of_units], of_units)
    at = tokens - rows.starts[rows.row_of_token[tokens]]
    places = TokenPlaces(line[units.of_call[call]], call, at, line, last)
    episodes, index = lay_episodes(places, units.reward)
    place = np.full(len(rows.ids), -1, np.int32)
    place[tokens] = index
    return replace(rows, columns={**rows.columns, "place": place}), episodes


def _signal(advantages_U: Array, units: Units, rows: int, algorithm: Algorithm) -> dict[str, float]:
    """How many groups, of rows of the data and of units, have no advantage but 0; and how advantages are spread over the units."""
    if algorithm.needs_critic:
        return ALL_SIGNAL
    there = advantages_U != 0
    of_rows = np.bincount(units.row, weights=there, minlength=rows)
    of_units = np.bincount(units.group, weights=there)
    return {
        "zero_signal_groups": float((of_rows == 0).sum()),
        "zero_signal_unit_groups": float((of_units == 0).sum()),
        "advantage_mean": float(advantages_U.mean()) if len(there) else 0.0,
        "advantage_std": float(advantages_U.std()) if len(there) else 0.0,
        "advantage_max": float(abs(advantages_U).max(initial=0.0)),
        **(ALL_SIGNAL if algorithm.config.teacher is not None else {}),
    }


def _ages(rows: Rows, version: int) -> dict[str, float]:
    """Staleness: how many trained tokens are how many weight versions older than `version`, which trains on them; and their mean age."""
    trained = version - rows.columns["versions"][rows.weights != 0]
    ages, counts = np.unique(trained, return_counts=True)
    found = {f"token_age.{age}": float(n) for age, n in zip(ages.tolist(), counts, strict=True)}
    return {**found, "token_age_mean": float(trained.mean()) if len(trained) else 0.0}


def _with_streams(rows: Rows, advantages: Array, scale: Array) -> Rows:
    """The rows with columns `advantages` and `scale`, and engine log-probabilities and advantages only where a token is trained here."""
    trained = rows.weights > 0
    streams = {
        **rows.columns,
        "advantages": np.where(trained, advantages, 0.0).astype(np.float32),
        "scale": scale.astype(np.float32),
        "engine_logprobs": np.where(trained, rows.columns["engine_logprobs"], 0.0),
    }
    return replace(rows, columns=streams)


def _to_learn_from(rows: Rows, algorithm: Algorithm) -> Array:
    """The rows that have a gradient."""
    there = rows.weights != 0
    if algorithm.skip_zero_advantage:
        there &= rows.columns["advantages"] != 0
    return np.flatnonzero(np.bincount(rows.row_of_token, weights=there, minlength=len(rows)))


def _split(attempt: Array, minibatches: int, rng: np.random.Generator) -> list[Array]:
    """Row indices by update. Updates take rollouts at random, each with all of its rows, however it was cut into them."""
    owners, owner = np.unique(attempt, return_inverse=True)
    order = rng.permutation(len(owners)) if minibatches > 1 else np.arange(len(owners))
    turn = np.argsort(order)
    rows = np.argsort(turn[owner], kind="stable")
    counts = [np.isin(owner, part).sum() for part in np.array_split(order, minibatches)]
    return [part for part in np.split(rows, np.cumsum(counts)[:-1]) if len(part)]


def _roles_of_rows(rows: Rows, calls: Calls) -> list[str | None]:
    """The role of each row, which has trained tokens. RunError where they are of several, or of calls without a role."""
    trained = np.flatnonzero(rows.weights)
    found: list[set[str | None]] = [set() for _ in range(len(rows))]
    pairs = np.unique(np.stack([rows.row_of_token[trained], rows.columns["call"][trained]]), axis=1)
    for row, call in pairs.T.tolist():
        found[row].add(calls.roles[call])
    wrong = next((roles for roles in found if len(roles) != 1 or None in roles), None)
    if wrong is not None:
        names = ", ".join(sorted(map(str, wrong)))
        raise RunError(
            f"learner.lora.per_role: expected each row to be of one role, got one of {names}; the recorded spans are damaged"
        )
    return [roles.pop() for roles in found]


def _with_share(rows: Rows, updates: int) -> Rows:
    """As they are packed, without `call`. Each of several updates has a part of the rows, so its tokens weigh that many times more."""
    columns = {**rows.columns, "scale": rows.columns["scale"] * updates}
    del columns["call"]
    return replace(rows, columns=columns)


class _Packing(NamedTuple):
    layout: Layout
    world_size: int
    tokens: int

    def alike(self, rows: Rows, part: Array, role: str | None) -> list[list[Packed]]:
        """Micro-batches of these rows, by rank. FSDP's collectives need as many on every rank: the missing ones count nothing."""
        shares = self.layout.share(rows, part, self.world_size)
        packed = [self.layout.pack(rows.take(share), self.tokens) for share in shares]
        most = max(len(micros) for micros in packed)
        filler = pack(_idle(rows.take(part[:1])), self.tokens)
        filled = [micros + filler * (most - len(micros)) for micros in packed]
        return [[replace(micro, role=role) for micro in micros] for micros in filled]


def _pack_alike(
    rows: Rows, parts: list[Array], roles: list[str | None], packing: _Packing
) -> tuple[list[list[Update]], dict[str, float]]:
    """Updates by [update][rank], and the step's metrics of the tokens that they run forward. Roles take turns by their names."""
    updates, forward, least = [], 0, 0
    names = sorted(set(roles), key=str)
    number = np.array([names.index(role) for role in roles], np.int64)
    for part in parts:
        micros: list[list[Packed]] = [[] for _ in range(packing.world_size)]
        for i, role in enumerate(names):
            mine = part[number[part] == i]
            if not len(mine):
                continue
            for rank, more in enumerate(packing.alike(rows, mine, role)):
                micros[rank] += more
            least += Tree.of(rows.take(mine)).num_tokens
        forward += sum(
            micro.num_tokens for of_rank in micros for micro in of_rank if micro.weights.any()
        )
        updates.append([Update(of_rank) for of_rank in micros])
    return updates, {
        "tokens_forward": float(forward),
        "tokens_shared": float(len(rows.ids) - forward),
        "tokens_repeated": float(forward - least),
    }


def _idle(row: Rows) -> Rows:
    """A row of two tokens that count nothing."""
    two = {name: column[:2] for name, column in row.columns.items()}
    return Rows(row.ids[:2], np.array([2]), np.zeros(2, np.float32), two)
