"""Records as rows of a journal: columns as the protocol names them, damage named."""

from __future__ import annotations

import pytest

from agl_ray.store.journals.base import COLUMNS
from agl_ray.store.rows import TYPES, record_of, row_of
from agl_ray.types import (
    LLM,
    Attempt,
    AttemptStatus,
    EndReason,
    ResourcesUpdate,
    Rollout,
    StoreError,
    Worker,
)

RECORDS = {
    "rollout": Rollout(rollout_id="ro", input={"x": [1]}, start_time=1.0, mode="val"),
    "attempt": Attempt(
        rollout_id="ro",
        attempt_id="at",
        sequence_id=2,
        start_time=1.0,
        end_time=2.0,
        status=AttemptStatus.FAILED,
        end_reason=EndReason.ENV_ERROR,
        worker_id="w",
    ),
    "resources": ResourcesUpdate(
        resources_id="rs",
        create_time=1.0,
        update_time=2.0,
        version=3,
        resources={"m": LLM(endpoint="http://x", model="m")},
    ),
    "worker": Worker(worker_id="w", status="busy"),
}


@pytest.mark.parametrize("kind", list(RECORDS))
def test_there_and_back(kind: str) -> None:
    record = RECORDS[kind]
    row = row_of(kind, "k", 4, record, 7)
    assert (row.kind, row.key, row.position) == (kind, "k", 4)
    for (name, of), value in zip(COLUMNS[kind].items(), row.columns, strict=True):
        assert value is None or type(value) is of, name
        expected = 7 if name == "created" else getattr(record, name)
        assert value == expected, name
    assert record_of(row, TYPES[kind]) == record


def test_state_is_bytes_as_they_are() -> None:
    assert row_of("state", "k", 0, b"\0\xff") == ("state", "k", 0, (), b"\0\xff")


def test_a_damaged_record_is_named() -> None:
    row = row_of("rollout", "ro-5", 0, RECORDS["rollout"])
    for body in (b'{"rollout_id": 7}', b"\xff\xfe", b""):
        with pytest.raises(StoreError, match=r"'ro-5' of table 'rollout' is damaged.*restore"):
            record_of(row._replace(body=body), Rollout)
