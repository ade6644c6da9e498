"""The packing plan: which examples share a packed row, computed once from their token lengths."""

import dataclasses
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class PackingPlan:
    """Rows of items; each row holds items of one stream only.

    Attributes:
      members: int64 [items], every item once, grouped by row in the order that they take there.
      row_starts: int64 [rows + 1], row r holds members[row_starts[r]:row_starts[r + 1]].
      row_streams: int32 [rows], the stream of each row; rows are sorted by stream.
    """

    members: np.ndarray
    row_starts: np.ndarray
    row_streams: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.row_streams)

    @property
    def max_segments(self) -> int:
        """Items in the fullest row, at least 1."""
        return int(np.diff(self.row_starts).max(initial=1))

    def row(self, index: int) -> np.ndarray:
        """Items of row `index`, in order."""
        return self.members[self.row_starts[index] : self.row_starts[index + 1]]

    def rows_of(self, stream: int) -> np.ndarray:
        """Indices of the rows of `stream`."""
        return np.flatnonzero(self.row_streams == stream)

    def save(self, path: Path) -> None:
        np.savez(path, **dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> "PackingPlan":
        with np.load(path) as arrays:
            return cls(**arrays)


def plan(
    lengths: np.ndarray, stream_ids: np.ndarray, sequence_length: int, seed: int
) -> PackingPlan:
    """Packs items into rows by first-fit, in a random order fixed by the seed.

    The order is drawn afresh for each stream, so that a stream's rows do not depend on which other
    streams there are.

    Args:
      lengths: int [items], tokens of each item, between 1 and `sequence_length`.
      stream_ids: int [items], the stream of each item, from 0.
      sequence_length: tokens in a row.
      seed: of the order.
    """
    lengths, stream_ids = np.asarray(lengths), np.asarray(stream_ids)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= sequence_length:
        raise ValueError(
            f"lengths span {lengths.min()} to {lengths.max()}; cut items to 1..{sequence_length} "
            "tokens before planning"
        )
    rows: list[list[int]] = []
    row_streams: list[int] = []
    for stream in np.unique(stream_ids):
        items = np.random.default_rng(seed).permutation(np.flatnonzero(stream_ids == stream))
        packed = _first_fit(items.tolist(), lengths[items].tolist(), sequence_length)
        rows += packed
        row_streams += [stream] * len(packed)
    return PackingPlan(
        members=np.array([item for row in rows for item in row], np.int64),
        row_starts=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        row_streams=np.array(row_streams, np.int32),
    )


def _first_fit(items: list[int], lengths: list[int], capacity: int) -> list[list[int]]:
    """Puts each item into the first row with room, in O(n log n).

    `room` is a binary tree over all possible rows: a leaf is the room left in its row, a parent
    the larger of its children, so the leftmost leaf with enough room is one walk down.
    """
    leaves = 1 << max(len(items) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)
    rows: list[list[int]] = []
    for item, length in zip(items, lengths, strict=True):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        row = node - leaves
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows
