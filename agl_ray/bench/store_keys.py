"""What `agl-ray bench store` measures, and what its keys mean.

A flow is: take a rollout, send 4 spans, end the attempt (`agl_ray.bench.store_flow`). Its cases are named by path, journal (SQLite with
synchronous=FULL unless it says `memory`), profile (light unless it says otherwise) and flows in flight: `actor_heavy_32`.
Called by `agl_ray.bench.store`. Test alone: tests/unit/test_bench_store.py.
"""

from __future__ import annotations

from typing import NamedTuple


class FlowCase(NamedTuple):
    """path: `in_process` (a core of the measuring process), `actor` (the run's store actor), `http` (`agl-ray store serve`), `naive` (a
    plain Ray actor around dictionaries, a call per method), `peer_http`, `peer_actor` (agentlightning's memory store behind its
    own server, and in a plain Ray actor). number: of flows; quick: of flows with --quick."""

    path: str
    journal: str
    profile: str
    in_flight: int
    number: int
    quick: int

    @property
    def name(self) -> str:
        parts = [self.path]
        parts += [self.journal] if self.journal == "memory" and self.ours else []
        parts += [self.profile] if self.profile != "light" else []
        return "_".join([*parts, str(self.in_flight)])

    @property
    def ours(self) -> bool:
        return self.path in ("in_process", "actor", "http")


FLOWS = [
    FlowCase("in_process", "memory", "light", 32, 4000, 320),
    FlowCase("in_process", "sqlite", "light", 32, 4000, 320),
    FlowCase("actor", "memory", "light", 1, 1000, 60),
    FlowCase("actor", "memory", "light", 32, 4000, 320),
    FlowCase("actor", "sqlite", "light", 1, 1000, 100),
    FlowCase("actor", "sqlite", "light", 32, 4000, 640),
    FlowCase("actor", "sqlite", "single", 1, 500, 20),
    FlowCase("actor", "sqlite", "single", 32, 2000, 128),
    FlowCase("actor", "sqlite", "together", 1, 1000, 60),
    FlowCase("actor", "sqlite", "together", 32, 4000, 320),
    FlowCase("actor", "sqlite", "heavy", 1, 200, 20),
    FlowCase("actor", "sqlite", "heavy", 32, 1000, 128),
    FlowCase("http", "sqlite", "light", 1, 1000, 60),
    FlowCase("http", "sqlite", "light", 32, 4000, 320),
    FlowCase("http", "sqlite", "heavy", 32, 1000, 64),
    FlowCase("naive", "memory", "light", 1, 300, 20),
    FlowCase("naive", "memory", "light", 32, 1000, 96),
    FlowCase("naive", "memory", "heavy", 32, 500, 48),
]
PEER_FLOWS = [
    FlowCase("peer_http", "memory", "light", 1, 300, 40),
    FlowCase("peer_http", "memory", "light", 32, 600, 128),
    FlowCase("peer_http", "memory", "heavy", 32, 128, 32),
    FlowCase("peer_actor", "memory", "light", 1, 300, 40),
    FlowCase("peer_actor", "memory", "light", 32, 600, 128),
]

FLOW_KEYS = {
    "per_s": "flows per second",
    "p50_ms": "median of a flow",
    "p99_ms": "99th percentile of a flow",
    "cpu_ms": "CPU time of client and store together, per flow",
    "foreign_share": "share of the machine's cores that other processes used meanwhile (above 0.2: repeat it)",
}
RATIOS: dict[str, tuple[str, str]] = {
    "flow_ratio_http": ("actor_32", "peer_http_32"),
    "flow_ratio_http_1": ("actor_1", "peer_http_1"),
    "flow_ratio_http_memory": ("actor_memory_32", "peer_http_32"),
    "flow_ratio_http_memory_1": ("actor_memory_1", "peer_http_1"),
    "flow_ratio_http_single": ("actor_single_32", "peer_http_32"),
    "flow_ratio_http_together": ("actor_together_32", "peer_http_32"),
    "flow_ratio_http_together_1": ("actor_together_1", "peer_http_1"),
    "flow_ratio_http_to_http": ("http_32", "peer_http_32"),
    "flow_ratio_actor": ("actor_32", "peer_actor_32"),
    "flow_ratio_actor_1": ("actor_1", "peer_actor_1"),
    "flow_ratio_naive": ("actor_32", "naive_32"),
    "flow_ratio_naive_1": ("actor_1", "naive_1"),
    "flow_heavy_ratio_http": ("actor_heavy_32", "peer_http_heavy_32"),
    "flow_heavy_ratio_naive": ("actor_heavy_32", "naive_heavy_32"),
}
"""Flows per second of the first case divided by those of the second."""

CPU_RATIOS = {
    "flow_cpu_ratio_http": ("actor_32", "peer_http_32"),
    "flow_heavy_cpu_ratio_http": ("actor_heavy_32", "peer_http_heavy_32"),
}
"""CPU time per flow (client and store) of the second case divided by that of the first: hardly moved by a busy machine."""

KEYS = {
    **{
        name: f"flows per second, {ours} / {theirs}"
        + (" (only with --against agentlightning)" if theirs.startswith("peer") else "")
        for name, (ours, theirs) in RATIOS.items()
    },
    **{
        name: f"CPU per flow, {theirs} / {ours} (hardly moved by a busy machine)"
        for name, (ours, theirs) in CPU_RATIOS.items()
    },
    "spans_per_s": "sustained into one store actor, SQLite with synchronous=FULL: 4 writers, 64 spans a batch",
    "append_p50_ms": "median of an add_spans call in that load, until it is on disk",
    "append_p99_ms": "its 99th percentile",
    "append_cpu_ms": "CPU time of client and store together, per call",
    "append_foreign_share": "share of the machine's cores that other processes used meanwhile",
    "bytes_per_call": "bytes of the closed journal per model call of 8,192 prompt and 1,024 response ids with log-probabilities",
    "calls_written": "how many such calls were written (100,000; fewer with --quick)",
    "calls_per_s": "such calls per second, 4 writers",
    "rss_growth_mb": "MiB by which the store's process grew from a fifth of these calls to the last (a cache of 16 MiB)",
    "rss_mb": "MiB of that process at the end",
    "growth_ratio": "slowest operation: its median time at 1,000,000 rollouts / at 10,000 (not with --quick)",
    "growth_operation": "which operation that is",
    "growth_ratio_quick": "the same at 10,000 / at 1,000 (only with --quick)",
    "fsync_ms": "a write of 4 KiB with fsync on the disk of the journals, mean of 100",
    "seconds": "the whole benchmark",
    "load_1min": "load average of the machine at its end",
    "cpus": "cores of the machine",
}
"""Fixed keys. Beside them: `flow_CASE_KEY` for CASE of `FLOWS` and `PEER_FLOWS` and KEY of `FLOW_KEYS`; `peer_..._rss_kb_per_span`;
`growth_OPERATION_SIZE_ms`, the median of an operation in a store of SIZE finished rollouts; `open_SIZE_s`, opening that store."""
