"""A node of the cluster is removed before the spans on it reached the store: its attempts are incomplete, and run again, once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("lost_node.py")

pytestmark = pytest.mark.slow


def test_a_removed_nodes_attempts_are_incomplete_and_run_again() -> None:
    """In a process of its own: a Ray with two nodes beside that of the session."""
    with tempfile.TemporaryDirectory(prefix="agl") as folder:  # Ray's sockets need a short name
        (Path(folder) / "ray").mkdir()
        environment = {
            **os.environ,
            "RAY_TMPDIR": folder,  # the cluster's address is noted there, not for the whole machine
            "RAY_health_check_period_ms": "500",  # by default a lost node is noticed after half a minute
            "RAY_health_check_failure_threshold": "3",
        }
        done = subprocess.run(
            [sys.executable, str(PROGRAM), folder],
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
            env=environment,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [one for one in done.stdout.splitlines() if one.startswith("{")]
    said = json.loads(line)
    # Half of the spans came: the one that was said to have ended well is lost, too, and says why.
    assert [one[:2] for one in said["ended"]] == [[2, "lost"]] * 3
    assert "only 2 of the attempt's 4 spans" in said["ended"][0][2]
    for rollout in said["rollouts"].values():
        assert rollout["status"] == "succeeded"
        assert rollout["tries"] == [["lost", 2, None], ["ok", 4, 0.5]]
        assert rollout["stored"] == ["0", "1"]
