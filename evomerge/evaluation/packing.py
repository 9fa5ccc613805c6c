"""Packs the options of a document into one row behind their common prefix, which is then computed only once.

A packed row is the prefix, followed by the rest of each option. Every token keeps the position that it has in a row of
its own option. A mask lets it see only the prefix and its own option. So the model computes the same as on single
rows, up to rounding. Whether an architecture takes such a mask is tried on a tiny model of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Tokens = tuple[int, ...]
PREFIX, PADDING = 0, -1
LONGEST = 4
VOCABULARY = 64  # of the tiny models that are tried


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Several rows of tokens packed into one.

    rows: the rows.
    prefix: how many tokens all of them share at their beginning.
    """

    rows: tuple[Tokens, ...]
    prefix: int

    @property
    def tokens(self) -> Tokens:
        """The prefix, and behind it the rest of each row (its branch)."""
        return self.rows[0][: self.prefix] + tuple(token for row in self.rows for token in row[self.prefix :])

    @property
    def positions(self) -> list[int]:
        """For each token, the position that it has in its own row."""
        return [*range(self.prefix), *(place for row in self.rows for place in range(self.prefix, len(row)))]

    @property
    def segments(self) -> list[int]:
        """For each token 0 in the prefix, and 1, 2, ... in the branches."""
        branches = (number for number, row in enumerate(self.rows, 1) for _ in row[self.prefix :])
        return [PREFIX] * self.prefix + list(branches)

    def offsets(self) -> list[int]:
        """For each row, by how many columns its branch lies further right in the packed row than in its own."""
        offsets, end = [], 0
        for row in self.rows:
            offsets.append(end)
            end += len(row) - self.prefix
        return offsets


def pack(rows: Sequence[Tokens]) -> Iterator[PackedRow]:
    """Packed rows: rows that share more than half of their tokens are packed together.

    A packed row is at most `LONGEST` times as long as the longest row in it, since the cost of attention grows with
    the square of the length.

    rows: the distinct rows of one document.
    """
    together: list[Tokens] = []
    shared = 0
    for row in sorted(rows):
        common = _common(together[0][:shared], row) if together else 0
        longest = max(len(other) for other in (*together, row))
        packed = common + sum(len(other) - common for other in (*together, row))
        if together and 2 * common > longest and packed <= LONGEST * longest:
            together.append(row)
            shared = common
            continue
        if together:
            yield PackedRow(tuple(together), shared)
        together, shared = [row], len(row)
    if together:
        yield PackedRow(tuple(together), shared)


def _common(row: Tokens, other: Tokens) -> int:
    """How many tokens two rows share at their beginning."""
    for place, (first, second) in enumerate(zip(row, other, strict=False)):
        if first != second:
            return place
    return min(len(row), len(other))


def attention(config: Any, segments: torch.Tensor, positions: torch.Tensor) -> Any:
    """A model's attention mask for packed rows: a tensor, shape (rows, 1, length, length).

    It is a dictionary with a tensor per kind of layer where only some layers have a sliding window. The tensors are
    boolean; for plain (eager) attention, which adds its mask to the scores, they are numbers.

    config: the model's.
    segments: 0 in the prefix, 1, 2, ... in the branches, -1 in padding; shape (rows, length).
    positions: the position of each token; shape (rows, length).
    """
    length = segments.shape[1]
    order = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    keys, queries = segments[:, None, :], segments[:, :, None]
    whole = (((keys == PREFIX) | (keys == queries)) & order)[:, None]
    window = getattr(config, "sliding_window", None)
    if window is None:
        return _added(config, whole)
    near = whole & (positions[:, None, :, None] - positions[:, None, None, :] < window)
    whole, near = _added(config, whole), _added(config, near)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # every layer has the window
        return near
    if "sliding_attention" not in kinds:
        return whole
    return {"full_attention": whole, "sliding_attention": near}


def _added(config: Any, mask: torch.Tensor) -> torch.Tensor:
    """The mask, turned into numbers to be added where the model has plain attention."""
    if config._attn_implementation != "eager":
        return mask
    dtype = config.dtype or torch.float32
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
