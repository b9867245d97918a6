"""Call spans of attempts -> rows to train on: every response token in exactly one row, with who made it and how.

A call that continues another one (`parent_call`, `parent_tokens`, spans/schema.py) shares its tokens. One row is made per leaf
of that tree of tokens (`merge-prefix`): a conversation whose turns extend each other exactly is one row; where a
turn shares only part of its parent, the tree branches and the shared tokens are trained in the first of the rows.

Called by learner/prepare.py on rank 0. Columnar: Python loops run over calls, numpy over tokens. Test it alone with
tests/unit/test_trajectory_rows.py. Legend: C calls, N tokens of all rows, R rows, P tokens owned by all calls.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from agl_ray.spans.schema import KIND_CALL
from agl_ray.trajectory.ragged import Array, Rows, ragged_arange
from agl_ray.types.errors import RunError


@dataclass(frozen=True, slots=True)
class AttemptRows:
    """Rows of all attempts, in the order of the attempts.

    rows.weights is 1 where the policy made the token and it is trained here. rows.columns, each [N]: `engine_logprobs` float32 (0 where not
    made by the policy), `versions` int64 (weight version that made the token; -1 where none did), `temperature` float32 of its
    sampling (1 where none). attempt: int64 [R], the row's index in the list of attempts.
    num_calls, num_branches (calls that share only a part of their parent), num_failed_calls and num_greedy_calls (context only, not
    trained), num_without_calls (attempts that made no call).
    """

    rows: Rows
    attempt: Array
    num_calls: int
    num_branches: int
    num_failed_calls: int
    num_greedy_calls: int
    num_without_calls: int


@dataclass(frozen=True, slots=True)
class _Calls:
    """The calls of all attempts, in the order of the table. All arrays [C] but `own_*`, which are [P]: what a call's span holds itself."""

    names: list[str]
    attempt: Array
    parent: Array  # index of the parent call, -1 for none
    shared: Array  # leading tokens that are the parent's
    prompt: Array  # tokens of the whole prompt, shared ones included
    end: Array  # tokens of prompt + response
    trained: Array  # bool: its response is the policy's and counts
    starts: Array  # where the call's own tokens begin in own_*
    greedy: Array  # bool
    failed: Array  # bool
    own_ids: Array
    own_logprobs: Array
    own_versions: Array
    temperature: Array


def build_rows(spans: pa.Table, attempts: Sequence[tuple[str, str]]) -> AttemptRows:
    """The rows of these attempts from their spans (SPAN_SCHEMA; rows ordered by attempt, then sequence id).

    A call whose status is ERROR, or that was sampled at temperature 0, is context only. RunError names the attempt and the call whose
    columns contradict each other.
    """
    calls = _read_calls(spans, attempts)
    leaves = _leaves(calls)
    segments = _segments(calls, leaves)
    rows = _gather(calls, segments)
    return AttemptRows(
        rows,
        calls.attempt[leaves],
        num_calls=len(calls.names),
        num_branches=_num_branches(calls),
        num_failed_calls=int(calls.failed.sum()),
        num_greedy_calls=int(calls.greedy.sum()),
        num_without_calls=len(attempts) - len(np.unique(calls.attempt)),
    )


def retokenized_tokens(spans: pa.Table) -> int:
    """How many tokens of earlier model output had to be re-derived in these calls, as the gateway counted (contract 4: 0)."""
    attributes = spans.filter(pc.equal(spans["kind"], KIND_CALL))["attributes"]
    counted = (dict(row or []).get("agl.retokenized_tokens", "0") for row in attributes.to_pylist())
    return sum(int(value) for value in counted)


# --- reading -------------------------------------------------------------------------------------


def _read_calls(spans: pa.Table, attempts: Sequence[tuple[str, str]]) -> _Calls:
    table = spans.filter(pc.equal(spans["kind"], KIND_CALL)).combine_chunks()
    order = {attempt: index for index, attempt in enumerate(attempts)}
    keys = list(zip(_list(table, "rollout_id"), _list(table, "attempt_id"), strict=True))
    names = [
        f"call {span} of attempt {key[1]} of rollout {key[0]}"
        for span, key in zip(_list(table, "span_id"), keys, strict=True)
    ]
    attempt = np.array([_known(order, key) for key in keys], np.int64)
    prompt_ids, prompt_lengths = _ragged(table, "prompt_ids", np.int32)
    response_ids, response_lengths = _ragged(table, "response_ids", np.int32)
    logprobs, logprob_lengths = _ragged(table, "response_logprobs", np.float32)
    _same(names, "response_logprobs", response_lengths, logprob_lengths)
    parent, shared, prompt, end = _tree(table, names, keys, prompt_lengths, response_lengths)
    temperature = np.array([_temperature(row) for row in _list(table, "attributes")], np.float32)
    failed = np.array([status == "ERROR" for status in _list(table, "status")], bool)
    greedy = temperature <= 0
    lengths = prompt_lengths + response_lengths
    starts = np.cumsum(lengths) - lengths
    into_prompt = ragged_arange(starts, prompt_lengths)
    into_response = ragged_arange(starts + prompt_lengths, response_lengths)
    own_ids = np.empty(int(lengths.sum()), np.int32)
    own_ids[into_prompt], own_ids[into_response] = prompt_ids, response_ids
    own_logprobs = np.zeros(len(own_ids), np.float32)
    own_logprobs[into_response] = logprobs
    own_versions = np.full(len(own_ids), -1, np.int64)
    own_versions[into_response] = _versions(table, names, response_lengths)
    return _Calls(
        names, attempt, parent, shared, prompt, end, ~(failed | greedy), starts, greedy, failed,
        own_ids, own_logprobs, own_versions, temperature,
    )  # fmt: skip


def _list(table: pa.Table, name: str) -> list:
    return table[name].to_pylist()


def _known(order: dict[tuple[str, str], int], key: tuple[str, str]) -> int:
    if key not in order:
        raise RunError(
            f"the spans read for a training step hold attempt {key[1]} of rollout {key[0]}, which was not asked for"
        )
    return order[key]


def _ragged(table: pa.Table, name: str, dtype: type) -> tuple[Array, Array]:
    """A list column as flat values and lengths [C]; null is empty."""
    lengths = pc.fill_null(pc.list_value_length(table[name]), 0)
    values = pc.list_flatten(table[name])
    return np.asarray(values.to_numpy(), dtype), np.asarray(lengths.to_numpy(), np.int64)


def _same(names: list[str], column: str, expected: Array, got: Array) -> None:
    wrong = np.flatnonzero(expected != got)
    if len(wrong):
        call = wrong[0]
        raise RunError(
            f"{names[call]}: {column} expected {expected[call]} as the other columns say, got {got[call]}; "
            "the recorded spans are damaged"
        )


def _tree(
    table: pa.Table,
    names: list[str],
    keys: list[tuple[str, str]],
    prompt_lengths: Array,
    response_lengths: Array,
) -> tuple[Array, Array, Array, Array]:
    """parent, shared, prompt, end: [C] each. A parent must come before its child in the same attempt."""
    num_calls = len(names)
    parent, shared = np.full(num_calls, -1, np.int64), np.zeros(num_calls, np.int64)
    end = np.zeros(num_calls, np.int64)
    seen: dict[tuple[tuple[str, str], str], int] = {}
    columns = (_list(table, "span_id"), _list(table, "parent_call"), _list(table, "parent_tokens"))
    for call, (span_id, parent_id, tokens) in enumerate(zip(*columns, strict=True)):
        if parent_id is not None:
            found = seen.get((keys[call], parent_id), -1)
            if found < 0 or tokens is None or not 0 <= tokens <= end[found]:
                raise RunError(
                    f"{names[call]}: expected parent_call to name an earlier call of the same attempt with at least "
                    f"parent_tokens tokens, got parent_call {parent_id} and parent_tokens {tokens}"
                )
            parent[call], shared[call] = found, tokens
        end[call] = shared[call] + prompt_lengths[call] + response_lengths[call]
        seen[keys[call], span_id] = call
    prompt = shared + prompt_lengths
    said = np.asarray(table["prompt_tokens"].to_numpy(zero_copy_only=False), float)
    _same(names, "prompt_tokens", prompt, np.where(np.isnan(said), prompt, said).astype(np.int64))
    return parent, shared, prompt, end


def _temperature(attributes: list[tuple[str, str]] | None) -> float:
    """The sampling temperature in a call's `request` attribute (gateway/record.py); 1 where it says none."""
    found = dict(attributes or ())
    sampling = json.loads(found.get("request", "{}")).get("sampling") or {}
    return float(sampling.get("temperature", 1.0))


def _versions(table: pa.Table, names: list[str], response_lengths: Array) -> Array:
    """The weight version of every response token, from the run-length column."""
    column = table["weight_versions"]
    run_lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0).to_numpy(), np.int64)
    runs = pc.list_flatten(column)
    starts = np.asarray(pc.struct_field(runs, "start").to_numpy(), np.int64)
    versions = np.asarray(pc.struct_field(runs, "version").to_numpy(), np.int64)
    call_of_run = np.repeat(np.arange(len(names)), run_lengths)
    first = np.cumsum(run_lengths) - run_lengths
    ends = np.append(starts[1:], 0)
    last = (first + run_lengths - 1)[run_lengths > 0]
    ends[last] = response_lengths[run_lengths > 0]
    lengths = ends - starts
    firsts = first[run_lengths > 0]
    if (lengths < 0).any() or starts[firsts].any():
        wrong = call_of_run[np.flatnonzero(lengths < 0)] if (lengths < 0).any() else call_of_run
        raise RunError(
            f"{names[int(wrong[0])]}: expected weight_versions to start at 0 and rise within the response"
        )
    covered = np.bincount(call_of_run, weights=lengths, minlength=len(names)).astype(np.int64)
    _same(names, "weight_versions", response_lengths, covered)
    return np.repeat(versions, lengths)


# --- the tree of tokens ----------------------------------------------------------------------------


def _leaves(calls: _Calls) -> Array:
    """Calls that no other call of the attempt contains whole: one row each, in order."""
    children = np.flatnonzero(calls.parent >= 0)
    whole = calls.shared[children] == calls.end[calls.parent[children]]
    contained = np.zeros(len(calls.names), bool)
    contained[calls.parent[children[whole]]] = True
    return np.flatnonzero(~contained & (calls.end > 0))


def _num_branches(calls: _Calls) -> int:
    children = np.flatnonzero(calls.parent >= 0)
    return int((calls.shared[children] < calls.end[calls.parent[children]]).sum())


def _segments(calls: _Calls, leaves: Array) -> Array:
    """int64 [K, 5]: (row, call, from, to, trained from) of every stretch of a row, in row order.

    `from`, `to`, `trained from` are places in the row; tokens of the response at or after `trained from` count in this row. Each row
    holds a first part of each of its calls, so what earlier rows trained of a call is always its first part too.
    """
    done = calls.prompt.copy()
    table: list[tuple[int, int, int, int, int]] = []
    for row, leaf in enumerate(leaves.tolist()):
        stretches = []
        call, to = leaf, int(calls.end[leaf])
        while call >= 0:
            start = int(calls.shared[call])
            if start < to:
                count_from = int(done[call]) if calls.trained[call] else to
                stretches.append((row, call, start, to, min(count_from, to)))
                done[call] = max(int(done[call]), to)
                to = start
            call = int(calls.parent[call])
        table.extend(reversed(stretches))
    return np.array(table, np.int64).reshape(-1, 5)


def _gather(calls: _Calls, segments: Array) -> Rows:
    row, call, start, to, count_from = segments.T
    lengths = to - start
    own = ragged_arange(calls.starts[call] + start - calls.shared[call], lengths)
    place = ragged_arange(start, lengths)
    made = place >= np.repeat(calls.prompt[call], lengths)
    counts = made & (place >= np.repeat(count_from, lengths)) & (place > 0)
    temperature = np.repeat(calls.temperature[call], lengths)
    columns = {
        "engine_logprobs": calls.own_logprobs[own],
        "versions": calls.own_versions[own],
        "temperature": np.where(counts, temperature, 1.0).astype(np.float32),
    }
    row_lengths = np.bincount(row, weights=lengths).astype(np.int64)
    return Rows(calls.own_ids[own], row_lengths, counts.astype(np.float32), columns)
