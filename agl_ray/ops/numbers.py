"""Numbers in a form that people read, and confidence intervals.

Called by the screen and the summary. Test alone: tests/unit/test_ops_summary.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959963984540054  # normal quantile of a two-sided 95 % interval


def wilson(successes: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion `successes / n` (Wilson 1927); (0, 1) for n = 0.

    `successes` may be a sum of rewards in [0, 1]: their variance is at most a coin's, so the interval is on the safe side.
    """
    if n == 0:
        return 0.0, 1.0
    if not 0 <= successes <= n:
        raise ValueError(f"wilson: expected 0 <= successes <= {n}, got {successes}")
    share = successes / n
    middle = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def confidence_interval(rewards: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Mean of `rewards` (at least one) and its 95 % interval: Wilson's where all lie in [0, 1], else the normal one."""
    n = len(rewards)
    if n == 0:
        raise ValueError("confidence_interval: expected at least one reward, got none")
    mean = math.fsum(rewards) / n
    if all(0 <= reward <= 1 for reward in rewards):
        return mean, wilson(min(math.fsum(rewards), float(n)), n)
    variance = math.fsum((reward - mean) ** 2 for reward in rewards) / max(1, n - 1)
    half = Z95 * math.sqrt(variance / n)
    return mean, (mean - half, mean + half)


def duration(seconds: float) -> str:
    """`0.4 s`, `38 s`, `4 min 05 s`, `2 h 03 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    if round(seconds) < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest:02d} min"


def short(value: float) -> str:
    """A count in at most five characters: `870`, `4.2k`, `12k`, `1.3M`."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            scaled = value / limit
            return f"{scaled:.1f}{unit}" if abs(scaled) < 9.95 else f"{scaled:.0f}{unit}"
    return f"{value:.0f}"


def bar(share: float, width: int) -> str:
    """`share` of `width` as a bar of `#`, padded to the width."""
    return ("#" * round(max(0.0, min(1.0, share)) * width)).ljust(width)
