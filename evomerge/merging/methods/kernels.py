"""Tensor arithmetic that must come out the same on every device, in every order, with any number of threads.

Uniform numbers, sums that scale a delta, and fingerprints are computed with integers, whose sums do not depend on
order.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cache

import numpy as np
import torch

from evomerge.devices import widened
from evomerge.merging.methods.drawn import Drawn, Field, field_part, key_of
from evomerge.merging.methods.passes import for_each_chunk

UNIFORM_STEPS = 1 << 16
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_SPLITMIX = ((30, -4658895280553007687), (27, -7723592293110705685))  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_L1_STEPS = float(1 << 30)
NEGLIGIBLE_WEIGHT = 1e-8
_PIECE = 1 << 20  # numbers that are added up at a time; another size would change the order of a sum, and so its bits
_COLUMNS = 1 << 15


def pieces(count: int, device: torch.device, elements: int = 1) -> Iterator[slice]:
    """Slices that cover a vector or the rows of a matrix. On a CPU they are so small that copies stay in the cache and
    fit into the holes that freed memory leaves; on other devices they are larger, so that launches are few. On the meta
    device all pieces are alike, so there is only the first.

    count: how many elements the vector has, or how many rows the matrix has.
    device: where the tensor is.
    elements: how many elements each row has; 1 for a vector.
    """
    size = max(1, piece_size(device) // max(1, elements))
    starts = range(0, count, size)
    return (slice(start, min(start + size, count)) for start in (starts[:1] if device.type == "meta" else starts))


def piece_size(device: torch.device) -> int:
    """How many elements a piece has (see `pieces`)."""
    return 1 << (16 if device.type == "cpu" else 20)


def uniform_field(seed: int, position: int, name: str, count: int, device: torch.device | str) -> torch.Tensor:
    """One uniform 16-bit number per element, shape (count,), int16 in [-32768, 32767].

    Each number is a hash of the seed, the position, the name and the element's index, so it depends on nothing else.

    seed: the recipe's seed.
    position: the position of the model in the recipe.
    name: the name of the output tensor.
    count: how many elements the tensor has.
    device: where the field is made.
    """
    made, field = Drawn(seed, position, name), torch.empty(count, dtype=torch.int16, device=device)
    for piece in pieces(count, field.device):
        field[piece].copy_(field_part(made, piece, field.device))
    return field


def as_field(uniforms: torch.Tensor, planes: bool) -> torch.Tensor:
    """A field of 16-bit numbers in the form that a pass reads.

    On CPUs torch compiles bytes to vector instructions, but not 16-bit integers.

    uniforms: int16 numbers, shape (count,).
    planes: whether the field becomes two planes of bytes, shape (2, count), high bytes first; otherwise it stays as
        it is.
    """
    if not planes:
        return uniforms
    field = torch.empty((2, uniforms.numel()), dtype=torch.uint8, device=uniforms.device)
    for piece in pieces(uniforms.numel(), uniforms.device):
        steps = uniforms[piece].to(torch.int32) + 32768
        field[0, piece], field[1, piece] = steps >> 8, steps & 255
    return field


def field_steps(field: torch.Tensor) -> torch.Tensor:
    """The numbers of a field as float32, counted from 0; shape (count,).

    field: two planes of bytes, int16 numbers, or wider integers that count from 0 already. (Numbers that compiled code
        makes again stand in the upper half of an int32: see `counted`.)
    """
    if field.dtype == torch.uint8:
        return field[0].to(torch.float32) * 256 + field[1].to(torch.float32)
    return field.to(torch.float32) + (32768 if field.dtype == torch.int16 else 0)


def counted(field: torch.Tensor) -> torch.Tensor:
    """A uniform field in a form that `field_steps` reads: where compiled code makes its numbers again, they are taken
    out of the upper half of int32 numbers."""
    return (field >> 16) & 0xFFFF if field.dtype == torch.int32 else field


def below(
    field: torch.Tensor, steps: torch.Tensor, limit: torch.Tensor, value: torch.Tensor | None = None
) -> torch.Tensor:
    """`value` where a number of a field is less than `steps`, else 0.0; float32, shape (count,).

    field: two planes of bytes, int16 numbers, or numbers in the upper half of an int32, as compiled code makes them.
    steps: a scalar from 0 to 65536.
    limit: `limit_of(steps)`, an int32 scalar. Compiled code would compute it again for every few elements.
    value: a scalar; by default 1.0.
    """
    if field.dtype == torch.int16 and not torch.compiler.is_compiling():
        return indicator(torch.lt, field, steps - 32768, value=value)
    if field.dtype == torch.int32:  # on CPUs torch compiles no vector instructions that make floats of them
        return indicator(torch.lt, (field & -UNIFORM_STEPS) ^ (32768 - (1 << 31)), limit, value=value)
    return indicator(torch.lt, field_steps(field), steps, value=value)


def limit_of(steps: float) -> np.int32:
    """What `below` compares numbers in the upper half of an int32 with.

    Number k becomes (k - 32768) 65536 + 32768, which is less than the limits of k + 1 and more steps, and of no others.

    steps: a whole number from 0 to 65536.
    """
    return np.int32(min((int(steps) - 32768) * UNIFORM_STEPS, np.iinfo(np.int32).max))


def steps_of(density: float | torch.Tensor) -> float | torch.Tensor:
    """How many of the 65536 values of a uniform number lie below a density from 0 to 1."""
    if isinstance(density, torch.Tensor):
        return (density * UNIFORM_STEPS).round().to(torch.float32)
    return float(round(density * UNIFORM_STEPS))


Comparison = Callable[..., torch.Tensor]


def indicator(
    holds: Comparison,
    a: torch.Tensor,
    b: torch.Tensor | float,
    out: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
) -> torch.Tensor:
    """`value` where a comparison holds, else 0.0; float32.

    Outside of compiled code, a comparison that writes floats takes a fraction of the time of one that writes truth
    values, and arithmetic with floats is faster, too.

    holds: the comparison, such as `torch.lt`.
    a: the left side.
    b: the right side.
    out: where the result is written, which may be `a`; by default a new tensor. Compiled code ignores it.
    value: a scalar, not negative; by default 1.0.
    """
    if torch.compiler.is_compiling():
        return holds(a, b).to(torch.float32) if value is None else torch.where(holds(a, b), value, 0.0)
    held: torch.Tensor = holds(
        a, b, out=torch.empty(a.shape, dtype=torch.float32, device=a.device) if out is None else out
    )
    return held if value is None else held.mul_(value)


def exact_l1(delta: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """The sum of |delta| in whole numbers of `largest` / 2^30: an int64 scalar, the same in any order of summation.

    delta: a task vector, or a piece of one.
    largest: the largest |delta| of the whole task vector, a scalar.
    """
    return l1_steps(delta, largest).sum()


def l1_steps(delta: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """|delta| in whole numbers of `largest` / 2^30, int64 (see `exact_l1`)."""
    return (_of_largest(delta.abs(), largest) * _L1_STEPS).round().to(torch.int64).to(delta.device)


def square_steps(delta: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """delta^2 in whole numbers of `largest`^2 / 2^30, int64 (see `exact_l1`)."""
    return (_of_largest(delta, largest).square() * _L1_STEPS).round().to(torch.int64).to(delta.device)


def sum_of_squares(steps: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """The sum of squares, float64, that a sum of `square_steps` stands for."""
    return widened(steps) * (widened(largest).square() / _L1_STEPS)


def sums_below(field: Field, count: int, steps: Callable[[slice], torch.Tensor], device: torch.device) -> torch.Tensor:
    """A table of sums, int64, shape (65537,): entry k adds up the values of the elements whose field number, counted
    from 0, is less than k.

    field: one number per element.
    count: how many elements there are.
    steps: slice of the elements -> their values, whole numbers.
    device: where the values are.
    """
    table = torch.zeros(UNIFORM_STEPS + 1, dtype=torch.int64, device=device)
    for piece in pieces(count, device):
        table.index_add_(0, field_steps(field_part(field, piece, device)).to(torch.int64) + 1, steps(piece))
    return table.cumsum(0)


def _of_largest(values: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    return widened(values) / widened(largest).clamp(min=torch.finfo(torch.float64).tiny)


def ascending(tensor: torch.Tensor) -> torch.Tensor:
    """All elements from the least to the largest, flat. On CPUs NumPy sorts them, with vector instructions."""
    flat = tensor.flatten()
    if flat.device.type == "cpu":
        return torch.from_numpy(np.sort(flat.numpy()))
    return torch.empty_like(flat) if flat.is_meta else flat.sort().values


def kth_smallest(tensor: torch.Tensor, k: int) -> torch.Tensor:
    """The element at index k, from 0, of the sorted tensor; a scalar tensor."""
    flat = tensor.flatten()
    if flat.device.type == "cpu":
        return torch.from_numpy(np.partition(flat.numpy(), k))[k]
    return torch.kthvalue(flat, k + 1).values


def largest_magnitudes(delta: torch.Tensor, count: int) -> torch.Tensor:
    """A mask of the `count` largest |delta|. It is larger where more elements are as large as the least of them."""
    magnitude = delta.abs()
    return magnitude >= kth_smallest(magnitude, magnitude.numel() - count)


def ordered_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension, which stays with size 1; float64.

    The second half is added to the first until one element is left. This order is fixed, so the bits are the same on
    every device and with any number of threads.
    """
    total = widened(tensor)
    while (count := total.shape[-1]) > 1:
        half, odd = divmod(count, 2)
        folded = total[..., :half] + total[..., half : 2 * half]
        total = torch.cat([folded, total[..., -1:]], dim=-1) if odd else folded
    return total.sum(dim=-1, keepdim=True)  # of one element, or none


def ordered_total(values: Callable[[slice], torch.Tensor], count: int, device: torch.device) -> torch.Tensor:
    """The sum of a long vector, float64, shape (1,), added up in a fixed order and in little memory.

    values: slice of the vector -> its elements.
    count: how many elements the vector has.
    device: where the vector is.
    """
    sums: list[torch.Tensor] = []

    def add(start: int) -> None:
        total = ordered_sum(values(slice(start, min(start + _PIECE, count))))
        if not sums:  # one tensor, since a list of small ones would leave holes in malloc's memory
            sums.append(total.new_empty(-(-count // _PIECE)))
        sums[0][start // _PIECE] = total[0]

    for_each_chunk(add, range(0, count, _PIECE), device)
    return ordered_sum(sums[0] if sums else values(slice(0, 0)))


def divisor(total: float) -> float:
    """A sum of weights to divide by: `total` itself, or 1 where its magnitude is below 1e-8."""
    return total if abs(total) >= NEGLIGIBLE_WEIGHT else 1.0


def fingerprint_of(checksums: Iterable[int]) -> str:
    """The fingerprint of weights, 16 hexadecimal digits: the sum of their checksums, the same in any order.

    checksums: of all tensors.
    """
    return f"{sum(checksums) % (1 << 64):016x}"


def checksum(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """A checksum of a tensor's bits, an int64 scalar: each 32-bit word times an odd number for its place, added up.

    An odd multiplier is invertible modulo 2^64, so no single changed word goes unnoticed.

    tensor: of any dtype.
    name: the tensor's name, which is part of the checksum like its shape and its dtype.
    """
    salt = int.from_bytes(key_of(name, tuple(tensor.shape), tensor.dtype), "little", signed=True)
    words = _words(tensor)
    columns = _columns(words.device)
    whole = words.numel() // _COLUMNS * _COLUMNS
    size = _COLUMNS * (1 if words.device.type == "cpu" else 256)  # in the cache, or in few launches

    rows = columns.new_empty(whole // _COLUMNS + 1)  # a list would leave holes in malloc's memory

    def put(start: int) -> None:
        stop = min(start + size, whole)
        sums = (words[start:stop].view(-1, _COLUMNS) * columns).sum(1)
        rows[start // _COLUMNS : stop // _COLUMNS].copy_(sums)

    for_each_chunk(put, range(0, whole, size), words.device)
    rows[-1] = (words[whole:] * columns[: words.numel() - whole]).sum()
    return (rows * _multipliers(salt, rows.numel(), rows.device)).sum() + salt


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's memory as 32-bit integers, the last one filled up with zeros."""
    octets = tensor.detach().contiguous().flatten().view(torch.uint8)
    if octets.numel() % 4 or octets.storage_offset() % 4:
        octets = torch.cat([octets, octets.new_zeros(-octets.numel() % 4)])
    return octets.view(torch.int32)


@cache
def _columns(device: torch.device) -> torch.Tensor:
    return _multipliers(0, _COLUMNS, device)


def _multipliers(salt: int, count: int, device: torch.device) -> torch.Tensor:
    """Odd 64-bit hashes of the numbers 1 to `count`, one for each place ("splitmix64", Steele et al. 2014)."""
    mixed = torch.arange(1, count + 1, dtype=torch.int64, device=device) * _GOLDEN + salt
    for shift, factor in _SPLITMIX:
        mixed = (mixed ^ (mixed >> shift & ((1 << 64 - shift) - 1))) * factor
    return mixed | 1
