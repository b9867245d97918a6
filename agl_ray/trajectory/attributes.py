"""Attributes of spans, read in place: the texts of a few keys, without a copy of the long ones beside them.

Called by trajectory/calls.py and trajectory/rewards.py. Test it alone with tests/unit/test_trajectory_attributes.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from agl_ray.trajectory.ragged import Array

Entry = tuple[int, str, str]
"""Number of the span among those that were marked, key, value (JSON)."""


def entries(
    spans: pa.Table, here: pa.ChunkedArray, wanted: Callable[[pa.Array], pa.Array]
) -> list[Entry]:
    """The attributes of the spans that `here` (bool, per span) marks, whose keys `wanted` finds (keys -> bool), in the order of the spans."""
    chunks = spans["attributes"].chunks
    if not chunks:
        return []
    offsets = [chunk.offsets.to_numpy() for chunk in chunks]
    begins = [(int(one[0]), int(one[-1] - one[0])) for one in offsets]
    keys = pa.concat_arrays(
        [chunk.keys.slice(*begin) for chunk, begin in zip(chunks, begins, strict=True)]
    )
    values = pa.chunked_array(
        [chunk.items.slice(*begin) for chunk, begin in zip(chunks, begins, strict=True)]
    )
    marked = here.to_numpy()
    span: Array = np.repeat(np.arange(len(marked)), np.concatenate([np.diff(o) for o in offsets]))
    found = wanted(keys).to_numpy(zero_copy_only=False)
    places = np.flatnonzero(found & marked[span])
    index = pa.array(places)
    number = (np.cumsum(marked) - 1)[span[places]].tolist()
    texts = values.take(index).to_pylist()
    return list(zip(number, keys.take(index).to_pylist(), texts, strict=True))
