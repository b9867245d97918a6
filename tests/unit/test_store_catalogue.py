"""The behaviour catalogue of the store, in this process: in memory, on a file, from another loop, over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("store_catalogue")

from store_catalogue import label, scenarios  # noqa: E402
from store_catalogue.common import Scenario  # noqa: E402
from store_catalogue.ways import WAYS, go  # noqa: E402


def cases() -> list[Any]:
    """Every scenario by every way; the ways beside the file are for the long run."""
    return [
        pytest.param(
            scenario,
            way,
            id=f"{label(scenario)}-{way}",
            marks=[] if way == "sqlite" else [pytest.mark.slow],
        )
        for scenario in scenarios()
        for way in WAYS
    ]


@pytest.mark.parametrize(("scenario", "way"), cases())
def test_catalogue(scenario: Scenario, way: str, tmp_path: Path) -> None:
    reach, url = WAYS[way]
    go(scenario, reach, url.format(folder=tmp_path))
