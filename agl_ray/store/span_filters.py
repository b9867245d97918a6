"""Filters and order of spans, carried out on Arrow columns.

Who calls it: `agl_ray.store.span_calls`. Test alone: tests/store_catalogue/spans.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from agl_ray.store.contract import check_logic, check_order, check_sort

SORTS = {
    name: name
    for name in (
        *("sequence_id", "name", "kind", "status", "trace_id", "span_id", "parent_id"),
        *("attempt_id", "role", "model", "reward"),
    )
} | {"start_time": "start_ns", "end_time": "end_ns"}


class SpanFilters(NamedTuple):
    """exact, contains: (column, text). Made by `checked`."""

    exact: tuple[tuple[str, str], ...]
    contains: tuple[tuple[str, str], ...]
    any_of: bool
    order_by: str
    descending: bool

    def apply(self, table: pa.Table) -> pa.Table:
        """The rows that fit, in order; equal ones by sequence id; what is empty comes first (descending: last)."""
        masks = [pc.equal(table[column], text) for column, text in self.exact]
        masks += [pc.match_substring(table[column], text) for column, text in self.contains]
        if masks:
            join = pc.or_ if self.any_of else pc.and_
            empty_fits_not = [pc.fill_null(mask, False) for mask in masks]
            table = table.filter(functools.reduce(join, empty_fits_not))
        order = "descending" if self.descending else "ascending"
        keys = [(name, order) for name in dict.fromkeys((self.order_by, "sequence_id"))]
        nulls = "at_end" if self.descending else "at_start"
        return table.take(pc.sort_indices(table, sort_keys=keys, null_placement=nulls))


def checked(
    *,
    exact: Mapping[str, Any],
    contains: Mapping[str, Any],
    filter_logic: str,
    sort_by: str,
    sort_order: str,
) -> SpanFilters:
    """None values are no filters. InputError names what is wrong."""
    check_sort(sort_by, SORTS)
    return SpanFilters(
        tuple((name, text) for name, text in exact.items() if text is not None),
        tuple((name, text) for name, text in contains.items() if text is not None),
        check_logic(filter_logic),
        SORTS[sort_by],
        check_order(sort_order),
    )
