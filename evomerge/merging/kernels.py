"""Tensor arithmetic that must come out the same on every device, in every order, with any number of threads.

Uniforms, sums that scale a delta, and fingerprints are therefore made of integers, whose sums do not depend on order.
"""

import hashlib

import torch

UNIFORM_STEPS = 1 << 16
_MASK32 = 0xFFFFFFFF
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_L1_STEPS = float(1 << 30)
NEGLIGIBLE_WEIGHT = 1e-8


def _key(*parts: object) -> bytes:
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """A bijective hash of 32-bit integers held in int64 ("lowbias32", Wellons 2018)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def uniform_field(seed: int, position: int, name: str, count: int, device: torch.device | str) -> torch.Tensor:
    """One uniform 16-bit number per element, shape (count,), int16 in [-32768, 32767].

    Drawn by counter from (seed, position of the model in the recipe, tensor name, element), so that an element's draw
    depends on nothing else.
    """
    key = _key(seed, position, name)
    low, high = int.from_bytes(key[:4], "little"), int.from_bytes(key[4:], "little")
    index = torch.arange(count, dtype=torch.int64, device=device)
    mixed = _mix32((index & _MASK32) ^ low)
    mixed = _mix32((mixed + (index >> 32) * 0x9E3779B1 + high) & _MASK32)
    return ((mixed >> 16) - 32768).to(torch.int16)


def keep_mask(uniforms: torch.Tensor, density: float | torch.Tensor) -> torch.Tensor:
    """True where u < density (one for all, or one per element), so that the masks of two densities are nested."""
    if isinstance(density, torch.Tensor):
        return uniforms.to(torch.int32) < (density * UNIFORM_STEPS).round().to(torch.int32) - 32768
    return uniforms.to(torch.int32) < round(density * UNIFORM_STEPS) - 32768


def exact_l1(delta: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """The sum of |delta| as an integer number of `largest` / 2^30; exact, so free of any order of summation."""
    steps = (
        delta.abs().to(torch.float64) / largest.to(torch.float64).clamp(min=torch.finfo(torch.float64).tiny)
    ) * _L1_STEPS
    return steps.round().to(torch.int64).sum()


def largest_magnitudes(delta: torch.Tensor, count: int) -> torch.Tensor:
    """A mask of the `count` largest |delta|; elements tied with the smallest of them are all kept."""
    magnitude = delta.abs()
    return magnitude >= kth_smallest(magnitude, magnitude.numel() - count)


def kth_smallest(tensor: torch.Tensor, k: int) -> torch.Tensor:
    """The element at index k of the sorted tensor, as a scalar tensor."""
    return torch.kthvalue(tensor.flatten(), k + 1).values


def ordered_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension (kept, with size 1) in float64, by adding the second half to the first.

    Element by element in a fixed order: the same bits on every device with any number of threads.
    """
    total = tensor.to(torch.float64)
    while (count := total.shape[-1]) > 1:
        half, odd = divmod(count, 2)
        folded = total[..., :half] + total[..., half : 2 * half]
        total = torch.cat([folded, total[..., -1:]], dim=-1) if odd else folded
    return total.sum(dim=-1, keepdim=True)  # of one element, or none


def divisor(value: float, like: torch.Tensor) -> torch.Tensor:
    """A sum of weights to divide by, as a scalar tensor; 1 where it is negligible, since it stands for nothing.

    On the tensor's device, because CUDA multiplies by the reciprocal of a plain number, which rounds otherwise.
    """
    return torch.tensor(value if abs(value) >= NEGLIGIBLE_WEIGHT else 1.0, dtype=like.dtype, device=like.device)


def checksum(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """An int64 scalar of a tensor's bits and their places: the sum over elements of bits x an odd hash of the index.

    An odd multiplier is invertible modulo 2^64, so no single changed element goes unnoticed.
    """
    bits = tensor.detach().contiguous().flatten()
    view = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()]
    salt = int.from_bytes(_key(name, tuple(tensor.shape), tensor.dtype), "little", signed=True)
    index = torch.arange(1, bits.numel() + 1, dtype=torch.int64, device=bits.device)
    multiplier = (index * _GOLDEN ^ salt) | 1
    return (bits.view(view).to(torch.int64) * multiplier).sum() + salt
