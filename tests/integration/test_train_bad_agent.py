"""An agent that always fails ends the run before it begins: one paragraph that says what to do, exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.whole_run import REPO, WholeRun
from tests.integration.tiny_model import make

pytestmark = pytest.mark.slow

AGENTS = REPO / "tests" / "integration" / "agents_for_tests.py"


@pytest.mark.parametrize(
    ("agent", "said"),
    [
        ("raises", "KeyError: 'no such tool: search'"),
        ("not_a_number", "the agent returned nan as its reward"),
    ],
)
def test_the_agents_own_error_is_shown(tmp_path: Path, agent: str, said: str) -> None:
    run = WholeRun(tmp_path, make(tmp_path / "model"), [f"agent={AGENTS}:{agent}"]).start()
    try:
        assert run.finish() == 2, run.text
        last = run.seen[-1]
        assert last.startswith("agl-ray: the agent failed on each of 2 trial rollouts")
        assert said in last
        assert "Mend the agent" in last
        assert "Traceback" not in run.text
        assert run.left_over() == []
    finally:
        run.close()
