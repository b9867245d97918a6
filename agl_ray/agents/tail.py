"""The end of what a program prints: read to the last byte, so that it never blocks, and kept up to a bound.

Called by `processes` and `command`. Test alone: tests/unit/test_agents_command.py.
"""

from __future__ import annotations

import asyncio

KEPT = 64 * 1024  # bytes
PIECE = 1 << 20  # bytes of one read


class Tail:
    """The last `kept` bytes of a stream, and how many there were."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._pieces = bytearray()
        self.num_bytes = 0

    def add(self, piece: bytes) -> None:
        self.num_bytes += len(piece)
        self._pieces += piece[-self._kept :]
        if (
            len(self._pieces) > 2 * self._kept
        ):  # not at each piece: small ones would be copied again and again
            del self._pieces[: -self._kept]

    @property
    def text(self) -> str:
        return bytes(self._pieces[-self._kept :]).decode("utf-8", "replace")

    def last_lines(self, most: int = 600) -> str:
        """The end of the text, at most `most` characters, in one line."""
        words = " | ".join(line.strip() for line in self.text[-most:].splitlines() if line.strip())
        return words[-most:]

    async def read(self, stream: asyncio.StreamReader) -> None:
        """Take everything until the stream's end."""
        while piece := await stream.read(PIECE):
            self.add(piece)
