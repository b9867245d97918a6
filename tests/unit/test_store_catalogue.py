"""The behaviour catalogue of the store, in this process: in memory, on a file, from another loop, over HTTP."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.register_assert_rewrite("store_catalogue")

from store_catalogue import label, scenarios  # noqa: E402
from store_catalogue.common import Scenario  # noqa: E402
from store_catalogue.ways import WAYS, go  # noqa: E402


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scenario", scenarios(), ids=label)
def test_catalogue(scenario: Scenario, way: str, tmp_path: Path) -> None:
    reach, url = WAYS[way]
    go(scenario, reach, url.format(folder=tmp_path))
