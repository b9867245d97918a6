"""Rows of a payload in verl's form: nested tensors of whole rows, each a prompt and a response with a mask of the trained tokens.

For verl the prompt is what stands before the first trained token, the response all from there on, whatever of it is trained; so a conversation of
several turns is one row, as with us. Called by learner/verl_engine.py. What needs no verl is tested by tests/unit/test_learner_verl_rows.py.
Legend: R rows of N tokens on this rank, P tokens of all responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from agl_ray.learner.packing import Packed
from agl_ray.trajectory.ragged import Array
from agl_ray.types.errors import RunError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class VerlRows:
    """One rank's rows of one update. ids: int64 [N]. lengths, prompts: int64 [R], tokens of the row and of its prompt (at least 1). temperature:
    float32 [R]. weights: float32 [N], 1 where a token is trained. columns: [N] each, as in Packed."""

    ids: Array
    lengths: Array
    prompts: Array
    temperature: Array
    weights: Array
    columns: Mapping[str, Array]

    @property
    def row_of_token(self) -> Array:
        """int64 [N]."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def in_response(self) -> Array:
        """bool [N]."""
        starts = np.cumsum(self.lengths) - self.lengths
        place = np.arange(len(self.ids)) - np.repeat(starts, self.lengths)
        return place >= np.repeat(self.prompts, self.lengths)

    @property
    def num_trained_rows(self) -> int:
        """Rows with a trained token."""
        return int((np.bincount(self.row_of_token, weights=self.weights) > 0).sum())


def gather_rows(micros: Sequence[Packed], at_least: int = 0) -> VerlRows:
    """All rows of these micro-batches, in order, and idle ones up to `at_least` rows: verl cuts micro-batches itself, as many on every rank, and
    needs a row for each. RunError where the trained tokens of a row were sampled at different temperatures."""
    if any(micro.shared.any() for micro in micros):
        raise RunError("rows for verl: expected whole rows, got rows that share tokens")
    ids = np.concatenate([micro.input_ids[0] for micro in micros])
    lengths = np.concatenate([micro.lengths for micro in micros])
    weights = np.concatenate([micro.weights for micro in micros])
    names = micros[0].columns
    columns = {name: np.concatenate([micro.columns[name] for micro in micros]) for name in names}
    missing = max(0, at_least - len(lengths))
    if missing:
        lengths = np.append(lengths, np.full(missing, 2))
        ids, weights = _lengthened(ids, 2 * missing), _lengthened(weights, 2 * missing)
        columns = {name: _lengthened(column, 2 * missing) for name, column in columns.items()}
    row = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    first = np.full(len(lengths), len(ids), np.int64)
    trained = np.flatnonzero(weights)
    np.minimum.at(first, row[trained], trained)
    prompts = np.where(first < len(ids), np.maximum(first - starts, 1), 1)
    temperature = _temperatures(columns.get("temperature"), trained, row, len(lengths))
    return VerlRows(ids, lengths, prompts, temperature, weights, columns)


def _lengthened(values: Array, more: int) -> Array:
    return np.append(values, np.zeros(more, values.dtype))


def _temperatures(column: Array | None, trained: Array, row: Array, num_rows: int) -> Array:
    made = np.ones(num_rows, np.float32)
    if column is None:
        return made
    made[row[trained]] = column[trained]
    if (made[row[trained]] != column[trained]).any():
        raise RunError(
            "learner.backend verl takes one temperature per row, and the calls of a row were sampled at different ones; let the agent ask for one "
            "temperature, or say trajectory.rows: per-call"
        )
    return made


def tensordict_of(
    rows: VerlRows, streams: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> Any:
    """The TensorDict that verl's engine takes. streams: [N] each; of them the response's part goes under the same name. settings: verl's switches of
    a batch, by its names."""
    import torch
    from verl.utils.tensordict_utils import get_tensordict

    def nested(values: torch.Tensor, lengths: Array) -> torch.Tensor:
        offsets = torch.from_numpy(np.append(0, np.cumsum(lengths)))
        return torch.nested.nested_tensor_from_jagged(values, offsets=offsets)

    response = torch.from_numpy(rows.in_response)
    answered = rows.lengths - rows.prompts
    ids = torch.from_numpy(rows.ids)
    starts = np.cumsum(rows.lengths) - rows.lengths
    place = torch.arange(len(ids)) - torch.from_numpy(np.repeat(starts, rows.lengths))
    mask = nested(torch.from_numpy(rows.weights)[response], answered)
    tensors = {
        "input_ids": nested(ids, rows.lengths),
        "position_ids": nested(place, rows.lengths),
        "prompts": nested(ids[~response], rows.prompts),
        "responses": nested(ids[response], answered),
        "response_mask": mask,
        "loss_mask": mask,
        "temperature": torch.from_numpy(rows.temperature),
        **{name: nested(stream[response], answered) for name, stream in streams.items()},
    }
    return get_tensordict(tensors, non_tensor_dict=dict(settings))


def token_values(nested: torch.Tensor, rows: VerlRows) -> torch.Tensor:
    """float32 [N] on the CPU, 0 where a token is not trained: what verl's engine said of the trained tokens (it gives the value of a token at the
    place before it)."""
    import torch

    shifted = torch.roll(nested.values().detach().float().cpu(), 1)
    return torch.where(torch.from_numpy(rows.weights) > 0, shifted, 0.0)
