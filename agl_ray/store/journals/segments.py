"""Files of span payloads, end to end, in a folder that `pyarrow.fs` can reach: a disk, NFS, S3, GCS.

What it is: `Segments(uri)`, blocking: `write` puts payloads into one new file and returns where each is, `read` gives them back by range
and checks them, `remove` deletes files. A file is written once and never changed. On a local path it is on the disk (fsync of
file and folder) when `write` returns; on an object store it is what the service acknowledged.
Who calls it: `agl_ray.store.journals.outside`, in threads. Test alone: tests/unit/test_store_outside.py.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import fs

from agl_ray.types import ConfigError, StoreError

CHUNK_BYTES = 8 * 2**20  # payloads that lie side by side are read together up to here


class Place(NamedTuple):
    """Where a payload is: `size` bytes from `offset` of the file `segment`, with this CRC-32."""

    segment: str
    offset: int
    size: int
    crc: int


class MissingSegment(StoreError):
    """A file that a pointer names is not there."""


class Segments:
    """Files under `uri` (`file:///folder`, `s3://bucket/prefix`, `gs://bucket/prefix`). ConfigError: a URI that pyarrow cannot use."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        try:
            self._files, root = fs.FileSystem.from_uri(uri)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, ValueError) as error:
            raise ConfigError(
                f"store.payload: expected `journal` or a URI such as file:///folder or s3://bucket/prefix, got {uri!r}: {error}"
            ) from error
        self._root = root.rstrip("/")
        self._local = isinstance(self._files, fs.LocalFileSystem)

    def exists(self, name: str) -> bool:
        with self._explained("look at", name):
            return bool(self._files.get_file_info(self._path(name)).type != fs.FileType.NotFound)

    def write(self, name: str, payloads: Sequence[bytes]) -> list[Place]:
        """One new file with these payloads. After a StoreError there may be a part of it."""
        with self._explained("write", name):
            if self._local:
                self._write_local(name, payloads)
            else:
                with self._files.open_output_stream(self._path(name)) as file:
                    for payload in payloads:
                        file.write(payload)
        places, offset = [], 0
        for payload in payloads:
            places.append(Place(name, offset, len(payload), zlib.crc32(payload)))
            offset += len(payload)
        return places

    def _write_local(self, name: str, payloads: Sequence[bytes]) -> None:
        path = self._path(name)
        folder = os.path.dirname(path)
        if not os.path.isdir(folder):
            os.makedirs(folder, exist_ok=True)
            _sync_folder(os.path.dirname(folder))
        with open(path, "wb") as file:
            file.writelines(payloads)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(folder)

    def read(self, places: Sequence[Place]) -> dict[Place, bytes]:
        """The payloads at these places, all of one segment."""
        name, found = places[0].segment, dict[Place, bytes]()
        with self._explained("read", name), self._files.open_input_file(self._path(name)) as file:
            for run in _runs(sorted(set(places), key=lambda place: place.offset)):
                start = run[0].offset
                data = file.read_at(run[-1].offset + run[-1].size - start, start)
                for place in run:
                    at = place.offset - start
                    found[place] = self._intact(place, data[at : at + place.size])
        return found

    def _intact(self, place: Place, payload: bytes) -> bytes:
        where = f"store payload file {self.uri}/{place.segment}"
        if len(payload) < place.size:
            raise StoreError(
                f"{where}: expected {place.size} bytes at {place.offset}, got {len(payload)}: the file is shorter than it "
                "was; restore it from a copy"
            )
        if zlib.crc32(payload) != place.crc:
            raise StoreError(
                f"{where}: the {place.size} bytes at {place.offset} are damaged (checksum); restore it from a copy"
            )
        return payload

    def remove(self, names: Iterable[str]) -> None:
        """Delete these files; those that are gone already are no error."""
        for name in names:
            with self._explained("delete", name):
                try:
                    self._files.delete_file(self._path(name))
                except FileNotFoundError:
                    continue

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _explained(self, doing: str, name: str) -> Iterator[None]:
        where = f"store payload file {self.uri}/{name}"
        try:
            yield
        except FileNotFoundError as error:
            raise MissingSegment(
                f"{where}: it is missing and spans rest in it; bring it back (store.payload must name the folder it was "
                "written to), or forget its rollouts"
            ) from error
        except (OSError, pa.ArrowException) as error:
            full = getattr(error, "errno", None) == 28
            advice = "free some space and resume the run" if full else "check the folder's rights"
            raise StoreError(f"{where}: cannot {doing} it: {error} ({advice})") from error


def _runs(places: Sequence[Place]) -> Iterator[list[Place]]:
    """Neighbours without a gap, up to CHUNK_BYTES."""
    numbered: list[tuple[int, Place]] = []
    run, end, start = 0, -1, 0
    for place in places:
        if place.offset != end or place.offset + place.size - start > CHUNK_BYTES:
            run, start = run + 1, place.offset
        end = place.offset + place.size
        numbered.append((run, place))
    for _, group in groupby(numbered, key=lambda pair: pair[0]):
        yield [place for _, place in group]


def _sync_folder(path: str) -> None:
    folder: Any = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
