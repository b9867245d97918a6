"""Which records are in memory, how much they weigh, and which of them may leave.

What it is: bookkeeping about keys, the records themselves are in `agl_ray.store.state`. A record may leave when the journal
holds its last change, no command uses it (`pin`) and nothing keeps it (`stays`: an open attempt, the latest resources);
the least recently used goes first.
Who calls it: `agl_ray.store.state`, `agl_ray.store.loading`, `agl_ray.store.base`. Test alone: tests/unit/test_store_residents.py.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeAlias

Key: TypeAlias = tuple[str, str]
"""(kind, id). Kinds: `rollout` (with its attempts), `resources`, `state`."""


class Residents:
    """max_bytes: how much may stay in memory; where records that must stay fill it, the others keep an eighth of it, so that
    what was read ahead is not read again at once. stays: whether a key must stay for now."""

    def __init__(self, max_bytes: int, stays: Callable[[Key], bool]) -> None:
        self.max_bytes = max_bytes
        self.size = 0
        self._stays = stays
        self._weights: dict[Key, int] = {}
        self._changed: dict[Key, None] = {}  # not yet on their way to the journal
        self._travelling: dict[Key, Hashable] = {}  # the newest commit with a change of it
        self._carried: dict[Hashable, list[Key]] = {}
        self._pins: Counter[Key] = Counter()
        self._idle: OrderedDict[Key, int] = OrderedDict()  # may leave; their weights
        self._idle_size = 0

    def __len__(self) -> int:
        return len(self._weights)

    def weigh(self, key: Key, weight: int) -> None:
        """`key` is in memory and weighs so many bytes."""
        self._use(key)
        self.size += weight - self._weights.get(key, 0)
        self._weights[key] = weight

    def remove(self, key: Key) -> None:
        """`key` is gone for good."""
        self._use(key)
        self.size -= self._weights.pop(key, 0)
        self._changed.pop(key, None)
        self._travelling.pop(key, None)

    # The way to the journal.

    def changed(self, key: Key) -> None:
        self._changed[key] = None
        if key in self._idle:
            self._use(key)

    def sent(self, commit: Hashable) -> None:
        """All that changed so far travels with this commit."""
        if self._changed:
            self._carried.setdefault(commit, []).extend(self._changed)
            self._travelling.update(dict.fromkeys(self._changed, commit))
            self._changed.clear()

    def arrived(self, commit: Hashable) -> None:
        """The journal holds what travelled with this commit."""
        for key in self._carried.pop(commit, ()):
            if self._travelling.get(key) is commit:
                del self._travelling[key]
                self.settle(key)

    # Use.

    def pin(self, keys: Iterable[Key]) -> None:
        """Those of these that are in memory, or come there, stay until `unpin`."""
        for key in keys:
            self._pins[key] += 1
            self._use(key)

    def unpin(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self._pins[key] -= 1
            if not self._pins[key]:
                del self._pins[key]
                self.settle(key)

    def used(self, keys: Iterable[Key]) -> None:
        """They were looked at."""
        for key in keys:
            if key in self._idle:
                self._idle.move_to_end(key)

    def settle(self, key: Key) -> None:
        """`key` was just used; it may leave from now on where nothing holds it."""
        if (
            key in self._weights
            and key not in self._changed
            and key not in self._travelling
            and key not in self._pins
            and not self._stays(key)
        ):
            self._use(key)
            self._idle[key] = self._weights[key]
            self._idle_size += self._idle[key]

    def _use(self, key: Key) -> None:
        self._idle_size -= self._idle.pop(key, 0)

    def leaving(self) -> Iterator[Key]:
        """Who has to go, until the rest fits. They are taken off the books as they are given."""
        busy = self.size - self._idle_size
        allowed = max(self.max_bytes - busy, self.max_bytes // 8)
        while self._idle_size > allowed:
            key, weight = self._idle.popitem(last=False)
            self._idle_size -= weight
            self.size -= self._weights.pop(key)
            yield key
