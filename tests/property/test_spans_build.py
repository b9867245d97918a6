"""A batch of one span, built column by column from what Python gives, is what Arrow makes of the same row."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agl_ray.spans import SPAN_SCHEMA, span_batch
from agl_ray.spans.build import SHORT

REQUIRED = {
    "rollout_id": "ro-1",
    "attempt_id": "at-1",
    "span_id": "s",
    "name": "n",
    "kind": "span",
    "start_ns": 1,
    "end_ns": 2,
    "status": "OK",
}
ids = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20)
logprobs = st.lists(st.floats(width=32, allow_nan=False), max_size=20)
texts = st.one_of(st.none(), st.text(max_size=30), st.just("x" * (SHORT + 1)))
rows = st.fixed_dictionaries(
    {},
    optional={
        "prompt_ids": st.one_of(st.none(), ids, ids.map(tuple)),
        "response_ids": st.one_of(st.none(), ids),
        "response_logprobs": st.one_of(st.none(), logprobs),
        "model": texts,
        "finish_reason": texts,
        "role": texts,
    },
)


@given(rows)
def test_one_row_is_what_arrow_makes_of_it(given_columns: dict[str, Any]) -> None:
    row = REQUIRED | given_columns
    batch = span_batch([row])
    batch.validate(full=True)
    for name, value in row.items():
        expected = pa.array([value], SPAN_SCHEMA.field(name).type)
        assert batch.column(name).equals(expected), name


@pytest.mark.parametrize(
    ("column", "value"),
    [("prompt_ids", [2**31]), ("prompt_ids", ["a"]), ("response_logprobs", ["x"]), ("name", 5)],
)
def test_what_is_of_another_kind_is_refused(column: str, value: Any) -> None:
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError, OverflowError)):
        span_batch([REQUIRED | {column: value}])
