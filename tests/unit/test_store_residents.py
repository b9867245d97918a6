"""Who may leave memory: not before the journal has it, not while it is used, not while something keeps it."""

from __future__ import annotations

from agl_ray.store.residents import Key, Residents

A, B, C = ("rollout", "a"), ("rollout", "b"), ("rollout", "c")


def residents(max_bytes: int = 0, *staying: Key) -> Residents:
    return Residents(max_bytes, lambda key: key in staying)


def put(books: Residents, *keys: Key) -> None:
    for key in keys:
        books.weigh(key, 10)
        books.changed(key)


def test_nothing_leaves_before_its_last_change_has_arrived() -> None:
    books = residents()
    put(books, A)
    assert list(books.leaving()) == []
    books.sent("first")
    books.changed(A)
    books.sent("second")
    books.arrived("first")
    assert list(books.leaving()) == []
    books.arrived("second")
    assert list(books.leaving()) == [A]
    assert (len(books), books.size) == (0, 0)


def test_a_change_on_its_way_when_the_next_one_is_made() -> None:
    books = residents()
    put(books, A)
    books.sent("first")
    books.changed(A)
    books.arrived("first")
    assert list(books.leaving()) == []
    books.sent("second")
    books.arrived("second")
    assert list(books.leaving()) == [A]


def test_the_least_recently_used_goes_first_and_no_more_than_must() -> None:
    books = residents(20)
    put(books, A, B, C)
    books.sent("commit")
    books.arrived("commit")
    books.settle(A)
    assert list(books.leaving()) == [B]
    assert books.size == 20


def test_what_is_pinned_or_kept_stays() -> None:
    books = residents(0, C)
    put(books, A, B, C)
    books.pin([A, B])
    books.pin([A])
    books.sent("commit")
    books.arrived("commit")
    assert list(books.leaving()) == []
    books.unpin([A, B])
    assert list(books.leaving()) == [B]
    books.unpin([A])
    assert list(books.leaving()) == [A]
    assert books.size == 10


def test_weights_change_and_what_is_removed_weighs_nothing() -> None:
    books = residents()
    put(books, A, B)
    books.weigh(A, 30)
    assert books.size == 40
    books.remove(A)
    books.remove(("rollout", "unknown"))
    books.sent("commit")
    books.arrived("commit")
    assert list(books.leaving()) == [B]
    assert books.size == 0


def test_what_must_stay_leaves_the_others_an_eighth() -> None:
    books = residents(160, C)
    books.weigh(C, 1000)
    put(books, A, B, ("rollout", "d"))
    books.sent("commit")
    books.arrived("commit")
    assert list(books.leaving()) == [A]
    assert books.size == 1020
