"""Options of one document in one row, behind the prefix that they share, which is then computed once.

A packed row is the prefix followed by what is left of each option. Every token keeps the position that it would have
alone, and a mask lets it see the prefix and its own option only, so that the model computes what it computes on rows of
their own, up to rounding. Architectures whose attention takes such a mask are found by trying a tiny model of each.
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
    """Rows of tokens in one: the first `prefix` tokens, which they share, and behind them what is left of each."""

    rows: tuple[Tokens, ...]
    prefix: int

    @property
    def tokens(self) -> Tokens:
        return self.rows[0][: self.prefix] + tuple(token for row in self.rows for token in row[self.prefix :])

    @property
    def positions(self) -> list[int]:
        return [*range(self.prefix), *(place for row in self.rows for place in range(self.prefix, len(row)))]

    @property
    def segments(self) -> list[int]:
        """0 in the prefix, 1, 2, ... in the branches."""
        branches = (number for number, row in enumerate(self.rows, 1) for _ in row[self.prefix :])
        return [PREFIX] * self.prefix + list(branches)

    def offsets(self) -> list[int]:
        """For each row, how much further right its branch stands in the packed row than alone."""
        offsets, end = [], 0
        for row in self.rows:
            offsets.append(end)
            end += len(row) - self.prefix
        return offsets


def pack(rows: Sequence[Tokens]) -> Iterator[PackedRow]:
    """A document's distinct rows, those together that have more than half of their tokens in common.

    No row gets longer than a few of those in it, since attention costs the square.
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


def _common(one: Tokens, other: Tokens) -> int:
    """How many tokens two rows share at their beginning."""
    for place, (first, second) in enumerate(zip(one, other, strict=False)):
        if first != second:
            return place
    return min(len(one), len(other))


def attention(config: Any, segments: torch.Tensor, positions: torch.Tensor) -> Any:
    """What a model takes as its attention mask for packed rows: a tensor (rows, 1, length, length), or one per kind of
    layer where some see only a window. Boolean, or for plain attention, which adds its mask, numbers.

    segments and positions: (rows, length).
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
    """The mask as numbers to be added, where the model's attention is the plain one."""
    if config._attn_implementation != "eager":
        return mask
    dtype = config.dtype or torch.float32
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
