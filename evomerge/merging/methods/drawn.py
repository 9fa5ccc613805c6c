"""Uniform numbers by counter: a field that is kept and one that is made again have the same bits.

Each number is a hash of the seed, the model's position, the tensor's name and the element's index. All of it is 32-bit
arithmetic that wraps around, which every device has, and which torch compiles to vector instructions.
"""

import hashlib
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

ROW = 1 << 12  # elements whose index has the same upper bits
_MASK32 = 0xFFFFFFFF


def key_of(*parts: object) -> bytes:
    """Eight bytes that depend on all parts."""
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()


def _mix32(folded: torch.Tensor) -> torch.Tensor:
    """The inner steps of a hash of int32 numbers ("lowbias32", Wellons 2018).

    The whole hash begins and ends with `_fold`. The fold at the end changes the lower 16 bits alone. Products wrap
    around, and masks make the shifts logical.

    folded: the numbers, after the first fold.
    """
    x = folded * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    return x * _signed(0x846CA68B)


def _fold(x: torch.Tensor) -> torch.Tensor:
    """The numbers, whose lower 16 bits are mixed with the upper 16 bits."""
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(word: int) -> int:
    """A 32-bit word as an int32 number."""
    return (word & _MASK32) - ((word & 0x80000000) << 1)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A uniform field that is not kept: its numbers are made again wherever they are needed.

    seed: the recipe's seed.
    position: the position of the model in the recipe.
    name: the name of the output tensor.
    """

    seed: int
    position: int
    name: str

    def rows(self, start: int, count: int, device: torch.device) -> torch.Tensor:
        """What the numbers of some rows, of 4096 elements each, are made of: int32, shape (2, rows, 1).

        The upper bits of an index are the same throughout a row, so what is made of them is made once.

        start: the first element of the first row. The rows do not cross a multiple of 2^32.
        count: how many rows there are.
        device: where the numbers are made.
        """
        low, high = np.frombuffer(key_of(self.seed, self.position, self.name), dtype="<u4").tolist()
        first = (np.arange(count, dtype=np.uint32) * ROW + (start & _MASK32)) ^ low
        key = np.full(count, ((start >> 32) * 0x9E3779B1 + high) & _MASK32, dtype=np.uint32)
        words = np.stack([first ^ first >> 16, key])  # by NumPy, since so few numbers take torch longer
        return torch.from_numpy(words.view(np.int32)).unsqueeze(2).to(device)


Field = torch.Tensor | Drawn
"""A field that is kept, or one that is made again."""


def field_part(field: Field, piece: slice, device: torch.device) -> torch.Tensor:
    """A piece of a field, in a form that `field_steps` reads.

    field: kept or made again.
    piece: which elements. Where the field is made again, the piece must not cross a multiple of 2^32, since the
        numbers behind it would be wrong.
    device: where it is to be.
    """
    if isinstance(field, torch.Tensor):
        return field[..., piece]
    inside = piece.start % ROW
    count = piece.stop - piece.start
    rows = field.rows(piece.start - inside, -(-(inside + count) // ROW), device)
    numbers = draw(rows, columns_on(device)).flatten()
    return numbers[inside : inside + count]


@cache
def columns_on(device: torch.device) -> torch.Tensor:
    """The places in a row: int32, shape (4096,). On a CPU compiled code reads them faster than it makes them."""
    return torch.arange(ROW, dtype=torch.int32, device=device)


def draw(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The uniform numbers of some rows: int16, or in compiled code the upper half of int32, which is faster; shape
    (rows, 4096).

    rows: see `Drawn.rows`.
    columns: the places in a row.
    """
    first, key = rows.unbind()  # `first` is folded already (`Drawn.rows`), and no column reaches its upper 16 bits
    inner = _fold(_mix32(first ^ columns))
    mixed = _mix32(_fold(inner + key))  # without the last fold, which leaves the upper 16 bits as they are
    if torch.compiler.is_compiling():
        return mixed
    return ((mixed >> 16) ^ -32768).to(torch.int16)
