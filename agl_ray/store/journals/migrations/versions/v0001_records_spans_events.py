"""The first tables: records of each kind, spans, events, owners.

Every key starts with the run, so that runs share a database. Text sorts by code point (collation C). Nullable columns that
order a list are indexed with NULL first, the order in which a question gives them.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

RECORDS: dict[str, list[tuple[str, sa.types.TypeEngine]]] = {
    "rollout": [
        ("created", sa.BigInteger()),
        ("status", sa.Text(collation="C")),
        ("mode", sa.Text(collation="C")),
        ("start_time", sa.Double()),
        ("end_time", sa.Double()),
        ("resources_id", sa.Text(collation="C")),
    ],
    "attempt": [
        ("rollout_id", sa.Text(collation="C")),
        ("attempt_id", sa.Text(collation="C")),
        ("status", sa.Text(collation="C")),
        ("end_reason", sa.Text(collation="C")),
        ("worker_id", sa.Text(collation="C")),
        ("start_time", sa.Double()),
        ("end_time", sa.Double()),
    ],
    "resources": [
        ("version", sa.BigInteger()),
        ("create_time", sa.Double()),
        ("update_time", sa.Double()),
    ],
    "worker": [("status", sa.Text(collation="C"))],
    "state": [],
    "meta": [],
}

INDEXES = [
    "agl_ray_rollout_created ON agl_ray_rollout (run_id, created NULLS FIRST, key)",
    "agl_ray_rollout_status ON agl_ray_rollout (run_id, status, created NULLS FIRST, key)",
    "agl_ray_rollout_mode ON agl_ray_rollout (run_id, mode, created NULLS FIRST, key)",
    "agl_ray_rollout_start ON agl_ray_rollout (run_id, start_time NULLS FIRST, key)",
    "agl_ray_rollout_end ON agl_ray_rollout (run_id, end_time NULLS FIRST, key)",
    "agl_ray_rollout_queue ON agl_ray_rollout (run_id, position) WHERE position > 0",
    "agl_ray_attempt_of ON agl_ray_attempt (run_id, rollout_id, position)",
    # Open attempts have no end reason; counts per reason read this index alone.
    "agl_ray_attempt_reason ON agl_ray_attempt (run_id, end_reason NULLS FIRST, key)",
    "agl_ray_attempt_start ON agl_ray_attempt (run_id, start_time NULLS FIRST, key)",
    "agl_ray_resources_position ON agl_ray_resources (run_id, position NULLS FIRST, key)",
    "agl_ray_resources_created ON agl_ray_resources (run_id, create_time NULLS FIRST, key)",
]


def upgrade() -> None:
    for kind, columns in RECORDS.items():
        op.create_table(
            f"agl_ray_{kind}",
            sa.Column("run_id", sa.Text(collation="C"), primary_key=True),
            sa.Column("key", sa.Text(collation="C"), primary_key=True),
            sa.Column("position", sa.BigInteger(), nullable=False),
            *(sa.Column(name, kept) for name, kept in columns),
            sa.Column("body", sa.LargeBinary(), nullable=False),
        )
    op.create_table(
        "agl_ray_spans",
        *(
            sa.Column(name, sa.Text(collation="C"), nullable=False)
            for name in ("run_id", "rollout_id", "attempt_id", "batch_id")
        ),
        *(
            sa.Column(name, sa.BigInteger(), nullable=False)
            for name in ("first", "number", "size", "crc")
        ),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
    )
    # Sums over spans read this index alone, not the payloads.
    op.execute(
        "ALTER TABLE agl_ray_spans ADD CONSTRAINT agl_ray_spans_pkey "
        "PRIMARY KEY (run_id, rollout_id, attempt_id, batch_id) INCLUDE (first, number, size)"
    )
    # Payloads are Arrow buffers of numbers and compressed text: another try at compressing them costs more than it gains.
    op.execute("ALTER TABLE agl_ray_spans ALTER COLUMN payload SET STORAGE EXTERNAL")
    op.create_table(
        "agl_ray_event",
        sa.Column("run_id", sa.Text(collation="C"), primary_key=True),
        sa.Column("number", sa.BigInteger(), primary_key=True),
        sa.Column("body", sa.LargeBinary(), nullable=False),
    )
    op.create_table(
        "agl_ray_owner",
        sa.Column("run_id", sa.Text(collation="C"), primary_key=True),
        sa.Column("token", sa.Text(), nullable=False),
        sa.Column("starts", sa.BigInteger(), nullable=False),
        sa.Column("process", sa.Text(collation="C"), nullable=False),
        sa.Column("taken_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("span_schema", sa.Text(), nullable=False),
        sa.Column("last_event", sa.BigInteger(), nullable=False),
    )
    for index in INDEXES:
        op.execute(f"CREATE INDEX {index}")
