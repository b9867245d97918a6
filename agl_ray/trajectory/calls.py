"""The calls of attempts, columnar from Arrow: ids and who made them, which call continues which, and what may be trained.

Called by learner/prepare.py (`read_calls`); read by trajectory/rows.py and trajectory/credit.py. Python loops run over calls, numpy over
tokens. Test it alone with tests/unit/test_trajectory_rows.py. Legend: C calls, P and Q prompt and response tokens held by all spans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from agl_ray.spans.schema import KIND_CALL, ROLE_KIND
from agl_ray.trajectory.attributes import entries
from agl_ray.trajectory.ragged import Array
from agl_ray.types.errors import RunError

TAG = "agentlightning.tag."
"""Keys of a request's `metadata` that begin so have a tag of the call as their value (`agl_ray.tracing.names.make_tag_attributes`)."""
RETOKENIZED = "agl.retokenized_tokens"
COLUMNS = [
    *("rollout_id", "attempt_id", "span_id", "role", "status"),
    *("parent_call", "parent_tokens", "prompt_tokens", "weight_versions"),
]
"""Short ones, copied for the calls alone; ids and texts are read in place."""


class Use(IntEnum):
    """What a call's response is to training; of several, the first of FROZEN, FAILED, GREEDY, CONSTRAINED."""

    TRAINED = 0
    """Sampled from the policy, and it counts."""
    FAILED = 1
    """Its span's status is ERROR."""
    GREEDY = 2
    """Sampled at temperature 0: not the policy's distribution."""
    CONSTRAINED = 3
    """Forced into a form (`agl.constrained`): the engine's log-probabilities are not the policy's."""
    FROZEN = 4
    """Of a role that is not trained (`agl.role_kind`)."""


@dataclass(frozen=True, slots=True)
class Calls:
    """The calls of all attempts, in the order of the spans. Arrays are [C] but for those of tokens.

    attempts: (rollout id, attempt id) of all attempts that were asked for, those without a call too. attempt: index into it. parent: index
    of the call that this one continues, -1 for none. shared: leading tokens that are the parent's. prompt: tokens of the whole prompt,
    shared ones included. end: tokens of prompt + response. use: a `Use`. prompt_start, response_start: where a call's own tokens begin
    in prompt_ids [P], and in response_ids, logprobs (nats), versions [Q]. turn: its number in its attempt, from 1.
    tags: of its request's metadata (TAG). retokenized: tokens that had to be derived again, of all calls.
    """

    attempts: Sequence[tuple[str, str]]
    span_ids: list[str]
    roles: list[str | None]
    tags: list[tuple[str, ...]]
    attempt: Array
    turn: Array
    parent: Array
    shared: Array
    prompt: Array
    end: Array
    use: Array
    temperature: Array
    prompt_start: Array
    response_start: Array
    prompt_ids: Array
    response_ids: Array
    logprobs: Array
    versions: Array
    retokenized: int

    def __len__(self) -> int:
        return len(self.span_ids)

    @property
    def responses(self) -> Array:
        """int64 [C]: tokens of each response."""
        return self.end - self.prompt

    @property
    def trained(self) -> Array:
        """bool [C]: the response is the policy's and counts."""
        return self.use == Use.TRAINED

    def tokens_of(self, use: Use) -> int:
        """Response tokens of the calls of this use."""
        return int(self.responses[self.use == use].sum())


def read_calls(spans: pa.Table, attempts: Sequence[tuple[str, str]]) -> Calls:
    """The calls of these attempts from their spans (SPAN_SCHEMA; ordered by attempt, then sequence id).

    RunError names the attempt and the call whose columns contradict each other, or a trained one with a log-probability that is no number.
    """
    here = pc.equal(spans["kind"], KIND_CALL)
    table = (
        spans.select(COLUMNS).combine_chunks().filter(here).combine_chunks()
    )  # attributes are long texts: not copied
    keys = list(zip(_list(table, "rollout_id"), _list(table, "attempt_id"), strict=True))
    names = _Names(keys, _list(table, "span_id"))
    attempt = _attempts(attempts, keys)
    prompt_ids, prompt_lengths = _ragged(spans, here, "prompt_ids", np.int32)
    response_ids, response_lengths = _ragged(spans, here, "response_ids", np.int32)
    logprobs, logprob_lengths = _ragged(spans, here, "response_logprobs", np.float32)
    _same(names, "response_logprobs", response_lengths, logprob_lengths)
    attributes = _attributes(spans, here, ("request", "agl.constrained", RETOKENIZED, ROLE_KIND))
    parent, shared, prompt, end = _tree(table, names, prompt_lengths, response_lengths)
    outside = [call for call, kind in attributes[ROLE_KIND].items() if kind == '"endpoint"']
    _as_said(table, names, prompt, outside)
    temperature, tags = _requests(attributes["request"], len(names))
    use = np.full(len(names), Use.TRAINED, np.int64)  # what counts most is written last
    use[list(attributes["agl.constrained"])] = Use.CONSTRAINED
    use[temperature <= 0] = Use.GREEDY
    use[pc.equal(table["status"], "ERROR").to_numpy()] = Use.FAILED
    use[list(attributes[ROLE_KIND])] = Use.FROZEN
    _finite(names, logprobs, response_lengths, use == Use.TRAINED)
    return Calls(
        attempts, names.span_ids, _list(table, "role"), tags, attempt, _turns(attempt), parent, shared, prompt, end, use, temperature,
        _starts(prompt_lengths), _starts(response_lengths), prompt_ids, response_ids, logprobs,
        _versions(table, names, response_lengths),
        sum(int(value) for value in attributes[RETOKENIZED].values()),
    )  # fmt: skip


def retokenized_tokens(spans: pa.Table) -> int:
    """How many tokens of earlier model output had to be re-derived in these calls, as the gateway counted (contract 4: 0)."""
    here = pc.equal(spans["kind"], KIND_CALL)
    return sum(
        int(value) for value in _attributes(spans, here, (RETOKENIZED,))[RETOKENIZED].values()
    )


class _Names(Sequence[str]):
    """The calls' names in messages, made when one is asked for."""

    def __init__(self, keys: list[tuple[str, str]], span_ids: list[str]) -> None:
        self.keys, self.span_ids = keys, span_ids

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, call: Any) -> Any:
        rollout, attempt = self.keys[call]
        return f"call {self.span_ids[call]} of attempt {attempt} of rollout {rollout}"


def _list(table: pa.Table, name: str) -> list[Any]:
    values: list[Any] = table[name].to_pylist()
    return values


def _starts(lengths: Array) -> Array:
    return np.cumsum(lengths) - lengths


def _attempts(attempts: Sequence[tuple[str, str]], keys: list[tuple[str, str]]) -> Array:
    order = {attempt: index for index, attempt in enumerate(attempts)}
    unknown = next((key for key in keys if key not in order), None)
    if unknown is not None:
        raise RunError(
            f"the spans read for a training step hold attempt {unknown[1]} of rollout {unknown[0]}, which was not asked for"
        )
    return np.array([order[key] for key in keys], np.int64)


def _turns(attempt: Array) -> Array:
    order = np.argsort(attempt, kind="stable")
    counts = np.bincount(attempt) if len(attempt) else np.zeros(0, np.int64)
    turn = np.empty(len(attempt), np.int64)
    turn[order] = np.arange(len(attempt)) - np.repeat(_starts(counts), counts) + 1
    return turn


def _ragged(spans: pa.Table, here: pa.ChunkedArray, name: str, dtype: type) -> tuple[Array, Array]:
    """A list column of the spans that `here` marks as flat values and lengths [C]; null is empty."""
    column, marked = spans[name], here.to_numpy()
    lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0).to_numpy(), np.int64)
    if lengths[~marked].any():
        column = column.filter(here)  # a span that is no call carries ids: not ours
    values = pc.list_flatten(column)
    return np.asarray(values.to_numpy(), dtype), lengths[marked]


def _same(names: _Names, column: str, expected: Array, got: Array) -> None:
    wrong = np.flatnonzero(expected != got)
    if len(wrong):
        call = wrong[0]
        raise RunError(
            f"{names[call]}: {column} expected {expected[call]} as the other columns say, got {got[call]}; "
            "the recorded spans are damaged"
        )


def _finite(names: _Names, logprobs: Array, response_lengths: Array, trained: Array) -> None:
    """One that is not finite would make every weight of the learner nan."""
    call_of_token = np.repeat(np.arange(len(names)), response_lengths)
    wrong = np.flatnonzero(~np.isfinite(logprobs) & trained[call_of_token])
    if len(wrong):
        call = call_of_token[wrong[0]]
        raise RunError(
            f"{names[call]}: response_logprobs expected finite numbers, since the call is trained on, got {logprobs[wrong[0]]} for token "
            f"{wrong[0] - _starts(response_lengths)[call]} of the response; the engine computed no number there: look at its log and its weights"
        )


def _tree(
    table: pa.Table, names: _Names, prompt_lengths: Array, response_lengths: Array
) -> tuple[Array, Array, Array, Array]:
    """parent, shared, prompt, end: [C] each. A parent must come before its child in the same attempt."""
    parents: list[int] = []
    shares: list[int] = []
    ends: list[int] = []
    seen: dict[tuple[tuple[str, str], str], int] = {}
    columns = (
        names.keys,
        names.span_ids,
        _list(table, "parent_call"),
        _list(table, "parent_tokens"),
        (prompt_lengths + response_lengths).tolist(),
    )
    for call, (key, span_id, parent_id, tokens, own) in enumerate(zip(*columns, strict=True)):
        found = -1
        if parent_id is not None:
            found = seen.get((key, parent_id), -1)
            if found < 0 or tokens is None or not 0 <= tokens <= ends[found]:
                raise RunError(
                    f"{names[call]}: expected parent_call to name an earlier call of the same attempt with at least "
                    f"parent_tokens tokens, got parent_call {parent_id} and parent_tokens {tokens}"
                )
        parents.append(found)
        shares.append(tokens if parent_id is not None else 0)
        ends.append(shares[-1] + own)
        seen[key, span_id] = call
    shared = np.array(shares, np.int64)
    prompt = shared + prompt_lengths
    return np.array(parents, np.int64), shared, prompt, prompt + response_lengths


def _as_said(table: pa.Table, names: _Names, prompt: Array, outside: list[int]) -> None:
    """The ids are as many as `prompt_tokens` says, but for calls that a model outside answered: these have no ids."""
    said = np.array(table["prompt_tokens"].to_numpy(zero_copy_only=False), float)
    said[outside] = np.nan
    _same(names, "prompt_tokens", prompt, np.where(np.isnan(said), prompt, said).astype(np.int64))


class _Asked(msgspec.Struct):
    sampling: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None


def _requests(requests: Mapping[int, str], num_calls: int) -> tuple[Array, list[tuple[str, ...]]]:
    """Sampling temperature (1 where it says none) and tags of every call, of its `request` attribute (gateway/record.py)."""
    temperature = np.ones(num_calls, np.float32)
    tags: list[tuple[str, ...]] = [()] * num_calls
    decode = msgspec.json.Decoder(_Asked).decode
    for call, text in requests.items():
        asked = decode(text)
        temperature[call] = (asked.sampling or {}).get("temperature", 1.0)
        metadata = asked.metadata or {}
        tags[call] = tuple(str(tag) for key, tag in metadata.items() if key.startswith(TAG))
    return temperature, tags


def _attributes(
    spans: pa.Table, here: pa.ChunkedArray, wanted: Sequence[str]
) -> dict[str, dict[int, str]]:
    """The JSON texts of these attributes, by the number of the call."""
    found: dict[str, dict[int, str]] = {name: {} for name in wanted}
    names = pa.array(wanted)
    for call, name, text in entries(spans, here, lambda keys: pc.is_in(keys, names)):
        found[name][call] = text
    return found


def _versions(table: pa.Table, names: _Names, response_lengths: Array) -> Array:
    """The weight version of every response token, from the run-length column."""
    column = table["weight_versions"]
    run_lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0).to_numpy(), np.int64)
    runs = pc.list_flatten(column)
    starts = np.asarray(pc.struct_field(runs, "start").to_numpy(), np.int64)
    versions = np.asarray(pc.struct_field(runs, "version").to_numpy(), np.int64)
    call_of_run = np.repeat(np.arange(len(names)), run_lengths)
    first = _starts(run_lengths)
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
