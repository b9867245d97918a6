"""`agl-ray train` as a submitted job on a Ray cluster that was there before: plain lines, the cluster is left as it was."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import descendants

from tests.faults.whole_run import CONFIG, REPO
from tests.integration.tiny_model import make

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_head(temp: Path, ports: dict[str, int]) -> subprocess.Popen[bytes]:
    """A Ray head of our own on private ports, in the foreground of a process of ours: ending that process ends it."""
    words = [f"--{name}={port}" for name, port in ports.items()]
    words += ["--num-cpus=4", "--include-dashboard=true", "--object-store-memory=268435456"]
    words += ["--node-ip-address=127.0.0.1", f"--temp-dir={temp}"]
    return subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *words],
        stdout=subprocess.DEVNULL,
        # Ray 2.60 asks for a token where there is a dashboard; this one listens on loopback for the test alone.
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"},
    )


def connect(url: str, seconds: float = 240.0) -> Any:
    """A client of the cluster's job server, as soon as it answers."""
    from ray.job_submission import JobSubmissionClient

    deadline = time.monotonic() + seconds
    while True:
        try:
            return JobSubmissionClient(url)
        except ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def submit(client: Any, entrypoint: str, seconds: float = 240.0) -> str:
    """Submit as soon as the cluster's job agent is up, which is some seconds after the dashboard."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return str(client.submit_job(entrypoint=entrypoint))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)


def test_a_job_trains_on_the_cluster_and_leaves_it_running(tmp_path: Path, scratch: Path) -> None:
    from ray.job_submission import JobStatus

    config = tmp_path / "job.yaml"
    config.write_text(CONFIG.replace("cluster: {local_cpus: 4}", ""))
    names = ("port", "dashboard-port", "dashboard-agent-listen-port")
    ports = {name: free_port() for name in names}
    head = start_head(scratch / "head", ports)
    try:
        client = connect(f"http://127.0.0.1:{ports['dashboard-port']}")
        model = make(tmp_path / "model")
        words = f"model.path={model} runs_dir={tmp_path / 'runs'} train.steps=2"
        entrypoint = f"cd {REPO} && {sys.executable} -m agl_ray.cli train {config} {words}"
        job = submit(client, entrypoint)
        deadline = time.monotonic() + 600
        while not client.get_job_status(job).is_terminal():
            assert time.monotonic() < deadline, client.get_job_logs(job)
            time.sleep(1)
        logs = client.get_job_logs(job)
        assert client.get_job_status(job) == JobStatus.SUCCEEDED, logs
        assert "step 2/2" in logs
        assert "\x1b[" not in logs  # no terminal, no colours
        summary = json.loads((tmp_path / "runs" / "latest" / "summary.json").read_text())
        assert summary["updates"] == 2
        assert client.list_jobs()  # the cluster still answers
        assert not list(descendants(head.pid, "VLLM"))
    finally:
        head.terminate()
        head.wait(timeout=60)
