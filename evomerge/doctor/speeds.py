"""How fast devices copy and merge, beside each other."""

import time
from collections.abc import Callable, Iterator

import torch

from evomerge import devices
from evomerge.doctor import Finding, Patient
from evomerge.merging.methods import METHODS
from evomerge.merging.methods.base import Inputs
from evomerge.merging.methods.passes import room_on

_COPIED = 1 << 28  # bytes
_ROUNDS = 5
_MODELS = 3  # besides the base
_COLUMNS = 1024
# An uncompiled pass makes float32 copies of its tensors, which takes longer than the bytes that are counted. More than
# this means that the device computes where it should copy.
_MOST_OVER_FLOOR = 30.0
_SLOWER = 2.0  # than the fastest device of its kind, at most


def speeds(patient: Patient) -> Iterator[Finding]:
    """The bandwidth of each device, beside the others of its kind, and the time of a merge over that of its bytes."""
    within = {name: bandwidth(torch.device(name)) for name in patient.devices}
    for name, speed in within.items():
        device = torch.device(name)
        best = max(other for rival, other in within.items() if torch.device(rival).type == device.type)
        yield Finding(
            "copies",
            f"{name} ({devices.name_of(device)})",
            f"at least {best / _SLOWER / 1e9:.1f} GB/s, half of the fastest of its kind",
            f"{speed / 1e9:.1f} GB/s",
            speed >= best / _SLOWER,
        )
        if name != "cpu":
            crossing = from_host(device)
            yield Finding("copies", f"host to {name}", "more than 1 GB/s", f"{crossing / 1e9:.1f} GB/s", crossing > 1e9)
        ratio = _merge(device) / ((_MODELS + 2) * _elements(device) * 2 / speed)
        yield Finding(
            "merge of bfloat16 tensors by task_arithmetic",
            name,
            f"at most {_MOST_OVER_FLOOR:g} times as long as its bytes take to copy",
            f"{ratio:.1f} times",
            ratio <= _MOST_OVER_FLOOR,
        )


def _elements(device: torch.device) -> int:
    return (1 << 25) if devices.is_accelerator(device) else (1 << 22)


def least(work: Callable[[], object], device: torch.device) -> float:
    """The seconds of the fastest round, after one that does not count: noise only adds.

    work: what is timed.
    device: what it is done on.
    """
    times = []
    for _ in range(_ROUNDS + 1):
        devices.synchronize([device])
        started = time.perf_counter()
        work()
        devices.synchronize([device])
        times.append(time.perf_counter() - started)
    return min(times[1:])


def bandwidth(device: torch.device) -> float:
    """Bytes per second that move within a device; a copy reads and writes. `device`: the device."""
    size = int(min(_COPIED, devices.free_memory(device) / 8))
    here, there = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / least(lambda: there.copy_(here), device)


def from_host(device: torch.device) -> float:
    """Bytes per second that are copied to a device from the host. `device`: the device."""
    size = int(min(_COPIED, devices.free_memory(device) / 8))
    there = torch.ones(size, dtype=torch.uint8, device=device)
    host = devices.page_locked([size], torch.uint8, device).fill_(1)
    return size / least(lambda: there.copy_(host, non_blocking=True), device)


def _merge(device: torch.device) -> float:
    """The seconds of an uncompiled merge of one tensor of a base and three other models."""
    shape = (_elements(device) // _COLUMNS, _COLUMNS)
    base, *tuned = (torch.rand(shape).bfloat16().to(device) for _ in range(_MODELS + 1))
    inputs = Inputs(
        base=base,
        tensors=tuple(tuned),
        per_model=({"weight": 0.4},) * _MODELS,
        shared={"normalize": False, "lambda": 1.0},
        uniforms=lambda _: base,
        rescale="density",
    )
    out, method, room = torch.empty_like(base), METHODS["task_arithmetic"], room_on(device)
    return least(lambda: method.merge_into(out, inputs, room=room), device)
