"""The payload cache: bounded, and whole attempts or nothing."""

from __future__ import annotations

from agl_ray.store.cache import PayloadCache
from agl_ray.store.journals.base import SpanRow


def row(attempt: str, first: int, size: int = 10, number: int = 1) -> SpanRow:
    return SpanRow(f"b{first}", ("ro", attempt), first, number, b"x" * size)


def test_attempts_come_back_whole_and_the_least_used_goes_first() -> None:
    cache = PayloadCache(35)
    cache.append(row("a", 1), 0)
    cache.append(row("a", 2), 1)
    cache.append(row("b", 3), 0)
    assert cache.get(("ro", "a")) == [row("a", 1), row("a", 2)]
    cache.append(row("c", 4), 0)
    assert cache.get(("ro", "b")) is None
    assert cache.get(("ro", "a")) is not None
    assert cache.size == 30


def test_part_of_an_attempt_is_not_kept() -> None:
    cache = PayloadCache(100)
    cache.append(row("a", 5), 4)
    assert cache.get(("ro", "a")) is None
    cache.fill(("ro", "a"), [row("a", 1), row("a", 5)])
    cache.append(row("a", 6), 2)
    assert [one.first for one in cache.get(("ro", "a")) or []] == [1, 5, 6]
    cache.fill(("ro", "a"), [row("a", 1)])
    assert cache.size == 10


def test_one_attempt_larger_than_the_cache_is_not_held() -> None:
    cache = PayloadCache(15)
    cache.append(row("a", 1), 0)
    cache.append(row("a", 2), 1)
    assert cache.get(("ro", "a")) is None
    assert cache.size == 0
