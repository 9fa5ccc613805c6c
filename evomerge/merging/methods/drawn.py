"""Uniform numbers by counter: a field that is kept and one that is made again have the same bits.

Each number is a hash of the seed, the model's position, the tensor's name and the element's index. All of it is 32-bit
arithmetic that wraps around, which every device has, and which torch compiles to vector instructions.
"""

import hashlib
from dataclasses import dataclass

import torch

_MASK32 = 0xFFFFFFFF


def key_of(*parts: object) -> bytes:
    """Eight bytes that depend on all parts."""
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """A bijective hash of int32 numbers ("lowbias32", Wellons 2018), without its last step, which leaves the upper half
    of the bits as it is (see `_fold`). Products wrap around, and shifts are made logical by masks."""
    x = _fold(x) * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    return x * _signed(0x846CA68B)


def _fold(x: torch.Tensor) -> torch.Tensor:
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
    count: how many elements the tensor has.
    """

    seed: int
    position: int
    name: str
    count: int

    def counters(self, start: int, device: torch.device) -> torch.Tensor:
        """What the numbers of a piece are made of: int32, shape (3,).

        start: the piece's first element. No piece crosses a multiple of 2^32.
        device: where the numbers are made.
        """
        key = key_of(self.seed, self.position, self.name)
        low, high = int.from_bytes(key[:4], "little"), int.from_bytes(key[4:], "little")
        words = (start, low, (start >> 32) * 0x9E3779B1 + high)
        return torch.tensor([_signed(word) for word in words], dtype=torch.int32).to(device)


Field = torch.Tensor | Drawn
"""A field that is kept, or one that is made again."""


def field_part(field: Field, piece: slice, device: torch.device) -> torch.Tensor:
    """A piece of a field, in a form that `field_steps` reads.

    field: kept or made again.
    piece: which elements.
    device: where it is to be.
    """
    if isinstance(field, torch.Tensor):
        return field[..., piece]
    return draw(field.counters(piece.start, device), piece.stop - piece.start)


def draw(counters: torch.Tensor, count: int) -> torch.Tensor:
    """The uniform numbers of a piece: int16, or int32 in compiled code, where these are faster; shape (count,).

    counters: see `Drawn.counters`.
    count: how many elements the piece has.
    """
    start, low, high = counters[0], counters[1], counters[2]
    index = torch.arange(count, dtype=torch.int32, device=counters.device) + start
    mixed = _mix32(_fold(_mix32(index ^ low)) + high)
    if torch.compiler.is_compiling():
        return (mixed >> 16) & 0xFFFF
    return ((mixed >> 16) ^ -32768).to(torch.int16)
