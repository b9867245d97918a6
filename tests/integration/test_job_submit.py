"""`agl-ray train` as a submitted job on a Ray cluster that was there before: plain lines, the cluster is left as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.whole_run import CONFIG, REPO
from tests.integration.tiny_model import make

pytestmark = pytest.mark.slow

HEAD = """
import ray, sys
context = ray.init(address="local", num_cpus=4, include_dashboard=True, dashboard_port=0,
                   object_store_memory=256 * 2**20, _temp_dir=sys.argv[1])
print("READY", context.address_info["gcs_address"], context.dashboard_url, flush=True)
sys.stdin.read()
"""


def test_a_job_trains_on_the_cluster_and_leaves_it_running(tmp_path: Path, scratch: Path) -> None:
    from ray.job_submission import JobStatus, JobSubmissionClient

    config = tmp_path / "job.yaml"
    config.write_text(CONFIG.replace("cluster: {local_cpus: 4}", ""))
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD, str(scratch / "head")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert head.stdout is not None
        ready = next(line for line in head.stdout if line.startswith("READY"))
        client = JobSubmissionClient(f"http://{ready.split()[2]}")
        model = make(tmp_path / "model")
        words = f"model.path={model} runs_dir={tmp_path / 'runs'} train.steps=2"
        job = client.submit_job(
            entrypoint=f"cd {REPO} && {sys.executable} -m agl_ray.cli train {config} {words}"
        )
        deadline = time.monotonic() + 300
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
        left = [p.cmdline() for p in psutil.Process(head.pid).children(recursive=True)]
        assert not [words for words in left if "VLLM" in " ".join(words)]
    finally:
        assert head.stdin is not None
        head.stdin.close()
        head.wait(timeout=60)
