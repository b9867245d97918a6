"""One call for a process that runs agents: OpenTelemetry spans, threads, programs and model calls of a rollout find their attempt.

Who calls it: the runner, and every other process that runs an agent, after the agent's modules are loaded (a TracerProvider that they set is
used, with its own exporters) and before its first rollout.
"""

from __future__ import annotations


def follow() -> None:
    """Switch on what sdk.py, threads.py, subprocesses.py and clients.py do, for this process; calling it again changes nothing."""
    from agl_ray.tracing import clients, sdk, subprocesses, threads  # the SDK is no light import

    sdk.install()
    threads.follow_threads()
    subprocesses.follow_subprocesses()
    clients.follow_clients()
