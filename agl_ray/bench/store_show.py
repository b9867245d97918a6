"""The numbers of `agl-ray bench store` as tables for a person. Test alone: tests/unit/test_bench_store.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from agl_ray.bench.store_growth import OPERATIONS
from agl_ray.bench.store_keys import FLOW_KEYS, FLOWS, KEYS, PEER_FLOWS


def show_store(numbers: Mapping[str, Any]) -> None:
    """Flows, growth, and the fixed keys."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    flows = Table("flow", *FLOW_KEYS, title="flows: path_profile_in-flight")
    for case in [*FLOWS, *PEER_FLOWS]:
        values = [numbers.get(f"flow_{case.name}_{key}") for key in FLOW_KEYS]
        if values[0] is not None:
            flows.add_row(case.name, *map(_text, values))
    console.print(flows)
    sizes = sorted(int(size) for name in numbers for size in re.findall(r"^open_(\d+)_s$", name))
    growth = Table(
        "operation", *(f"{size:,}" for size in sizes), title="median ms by number of rollouts"
    )
    for name in OPERATIONS:
        growth.add_row(name, *(_text(numbers.get(f"growth_{name}_{size}_ms")) for size in sizes))
    growth.add_row("(opening, seconds)", *(_text(numbers.get(f"open_{size}_s")) for size in sizes))
    console.print(growth)
    wide = max(map(len, KEYS))
    for name in KEYS:
        if name in numbers:
            print(f"{name:<{wide}}  {_text(numbers[name])}")


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
