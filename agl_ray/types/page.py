"""One page of an answer: a sequence that also says where it stands in the whole.

Who calls it: `agl_ray.store.queries` makes them, everybody reads them. Test alone: tests/unit/test_types_page.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PaginatedResult(Sequence[T]):
    """`items` are those from `offset` on, at most `limit` (-1: all of them); `total` is how many match without paging.

    It behaves as the sequence of its items: `len`, indexes, slices (a list), iteration.
    """

    items: Sequence[T]
    limit: int
    offset: int
    total: int

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[T]:
        return iter(self.items)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        return self.items[index]
