"""Devices: what torch can compute on here, and what only some kinds of device have.

Everything that torch offers for one kind of accelerator alone (streams, page-locked memory, free memory, float64) is
asked for here, with a plain answer where there is none, so that no other file needs to know which kind it works on.
"""

import ctypes
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from evomerge.config.search import SearchConfig
from evomerge.errors import InputError, choices

_WORTH_COMPILING = 50_000_000  # parameters
_BUFFERS = 2  # one is filled while the device reads the other
_KINDS = ("cpu", "cuda", "mps", "xpu")  # what a search file may name on any machine; ROCm is `cuda` to torch


def resolve_dtype(dtype: str, stored: Iterable[str], device: str = "cpu") -> str:
    """The dtype of models in memory: for `auto`, the one that most tensors are stored in, but no wider than float32,
    and float32 where the device does not have it.

    dtype: as the search file says.
    stored: the dtypes of the base's tensors.
    device: the resolved device. One that is not on this machine is taken to have every dtype.
    Raises InputError where the search file says a dtype that the device does not have.
    """
    most = Counter(stored).most_common(1)[0][0] if dtype == "auto" else dtype
    if most == "float64" or (dtype == "auto" and lacks(device, most)):
        return "float32"
    if lacks(device, most):
        raise InputError(f"evaluation.dtype is {dtype}, which {device} does not have here; use float32 or auto.")
    return most


def lacks(device: str, dtype: str) -> bool:
    """Whether a device of this machine cannot compute with a dtype."""
    where = torch.device(device)
    return bool(device_count(where.type)) and not supports(where, getattr(torch, dtype))


def dtype_notes(device: str, dtype: str, stored: Iterable[str]) -> Iterator[str]:
    """What a user should know about the numbers that a device does not have, in sentences.

    device: the resolved device.
    dtype: the resolved dtype.
    stored: the dtypes of the base's tensors.
    """
    if lacks(device, "float64"):
        yield f"{device} has no float64, so sums that must be exact are taken on the CPU, which takes longer."
    if dtype not in (kinds := set(stored)) and any(lacks(device, kind) for kind in kinds - {"float64"}):
        yield f"{device} does not have the base's dtype, so models are kept in {dtype}, which may take more memory."


def resolve_compile(wanted: bool | str, device: str, parameters: int) -> bool:
    """Whether merges are compiled; `auto` compiles where it saves more time than it takes, and changes no bit.

    wanted: as the search file says.
    device: the resolved device.
    parameters: how many the base has.
    Raises InputError where compiled merges are wanted and no compiler is there.
    """
    compiler = os.environ.get("CXX", "g++")
    available = shutil.which(compiler) is not None
    if wanted is True and device == "cpu" and not available:
        raise InputError(
            f"evaluation.compile is true, but there is no C++ compiler ({compiler}); install one, or set it to false."
        )
    if wanted != "auto":
        return bool(wanted)
    return device == "cpu" and available and parameters >= _WORTH_COMPILING


def accelerator() -> str:
    """The kind of accelerator that torch can use here, such as `cuda`; `cpu` where there is none."""
    current = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if current is None or not device_count(current.type) else current.type


def device_count(kind: str) -> int:
    """How many devices of a kind torch sees here; one CPU."""
    if kind in ("cpu", "meta"):
        return 1
    current = torch.accelerator.current_accelerator(check_available=True)
    return torch.accelerator.device_count() if current is not None and current.type == kind else 0


def resolve_device(name: str, key: str = "evaluation.device") -> str:
    """The device to use; `auto` is the accelerator where there is one, else the CPU.

    name: as a user gives it.
    key: where the user gives it, which opens an error's message.
    Raises InputError for a device that does not exist here.
    """
    if name == "auto":
        return accelerator()
    kind, separator, number = name.partition(":")
    kinds = {*_KINDS, accelerator()}
    if kind not in kinds or bool(separator) != (number.isascii() and number.isdigit()) or (kind == "cpu" and number):
        raise InputError(f"{key} is '{name}'; {choices(name, _names(kinds))}.")
    seen = device_count(kind)
    if int(number or 0) >= seen:
        raise InputError(f"{key} is '{name}', but torch sees {seen} {kind.upper()} devices here; use {_usable()}.")
    return name


def _names(kinds: Iterable[str]) -> list[str]:
    return ["auto", "cpu", *(name for kind in sorted({*kinds} - {"cpu"}) for name in (kind, f"{kind}:N"))]


def _usable() -> str:
    """The devices that a user may name here."""
    kind = accelerator()
    if kind == "cpu":
        return "auto or cpu"
    count = device_count(kind)
    return f"auto, cpu or {kind if count == 1 else f'{kind}:0 to {kind}:{count - 1}'}"


def count_gpus(config: SearchConfig, device: str) -> int:
    """How many accelerators a worker divides its models over.

    config: says how many GPUs a worker has.
    device: the resolved device.
    Raises InputError where there are fewer here.
    """
    wanted = int(config.workers.num_gpus or 1)
    if wanted <= 1 or device == "cpu" or ":" in device:
        return 1
    seen = device_count(device)
    if wanted > seen:
        raise InputError(
            f"workers.num_gpus is {wanted}, but torch sees {seen} {device.upper()} devices here; lower it."
        )
    return wanted


def name_of(device: torch.device) -> str:
    """What a device calls itself, such as the name of a card; its kind where it has no name."""
    module: Any = torch.get_device_module(device.type) if is_accelerator(device) else None
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else device.type


def devices_of(device: str, count: int) -> list[torch.device]:
    """The devices that a worker uses.

    device: the resolved device.
    count: how many, the first ones of that kind.
    """
    return [torch.device(device)] if count == 1 else [torch.device(device, index) for index in range(count)]


def is_accelerator(device: torch.device) -> bool:
    """Whether a device computes beside the CPU, in memory of its own or at its own time."""
    return device.type not in ("cpu", "meta")


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device can compute with a dtype. It is tried once."""
    return not is_accelerator(device) or _supports(device.type, dtype)


@cache
def _supports(kind: str, dtype: torch.dtype) -> bool:
    if not _is_here(kind):
        return True  # a rehearsal, which computes nothing
    try:
        one = torch.ones(2, dtype=torch.float32, device=kind).to(dtype)
        return bool((one + one).sum().item() == 4)
    except (TypeError, RuntimeError):
        return False


def _is_here(kind: str) -> bool:
    try:
        return bool(torch.get_device_module(kind).is_available())
    except (AttributeError, RuntimeError):
        return False


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float64, on the CPU where its device has no float64. Sums whose last bit decides something are taken
    so, and their results go back as float32."""
    return tensor.to(exact_device(tensor.device)).to(torch.float64)


def exact_device(device: torch.device) -> torch.device:
    """Where float64 results about tensors of a device are computed: there, or on the CPU where it has no float64."""
    return device if supports(device, torch.float64) else torch.device("cpu")


def free_memory(device: torch.device) -> float:
    """How many bytes of a device's own memory are free for tensors; infinity where the device does not say."""
    if not is_accelerator(device):
        return math.inf
    module = torch.get_device_module(device.type)
    if hasattr(module, "mem_get_info"):
        return float(module.mem_get_info(device)[0])
    if hasattr(module, "recommended_max_memory"):  # of MPS, which shares the machine's memory
        return float(module.recommended_max_memory() - module.driver_allocated_memory())
    return math.inf


def used_memory(device: torch.device) -> int | None:
    """How many bytes this process's tensors take on a device; None where the device does not say."""
    module = torch.get_device_module(device.type) if is_accelerator(device) else None
    for name, arguments in (("memory_allocated", (device,)), ("current_allocated_memory", ())):
        if hasattr(module, name):
            return int(getattr(module, name)(*arguments))
    return None


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that this process's tensors took on a device since `reset_peak_memory`; None where the device
    does not say."""
    module: Any = torch.get_device_module(device.type) if is_accelerator(device) else None
    return int(module.max_memory_allocated(device)) if hasattr(module, "max_memory_allocated") else None


def reset_peak_memory(device: torch.device) -> None:
    """Has `peak_memory` start anew."""
    module: Any = torch.get_device_module(device.type) if is_accelerator(device) else None
    if hasattr(module, "reset_peak_memory_stats"):
        module.reset_peak_memory_stats(device)


def synchronize(devices: Iterable[torch.device]) -> None:
    """Waits until devices have done all that they were told to do. Raises what they have failed with meanwhile."""
    for device in devices:
        if is_accelerator(device):
            module = torch.get_device_module(device.type)
            module.synchronize(*([] if device.type == "mps" else [device]))  # there is only one


def empty_cache(devices: Iterable[torch.device]) -> None:
    """Gives memory that torch holds back for later tensors to others."""
    for kind in {device.type for device in devices if is_accelerator(device)}:
        if hasattr(module := torch.get_device_module(kind), "empty_cache"):
            module.empty_cache()


def trim() -> None:
    """Gives memory that the allocator of this process holds back for later to the system, where it can (glibc). Much of
    it is what compiling has left."""
    free = _malloc_trim()
    if free is not None:
        free(0)


@cache
def _malloc_trim() -> Any:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no library of that kind
        return None


@contextmanager
def seeded(devices: Sequence[torch.device], seed: int) -> Iterator[None]:
    """A context in which the global generators of the CPU and of devices start from a seed. Afterwards they go on as
    before."""
    others = [device for device in devices if is_accelerator(device)]
    kind = others[0].type if others else "cpu"
    with torch.random.fork_rng(devices=others, device_type=kind):
        torch.manual_seed(seed)
        yield


def page_locked(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An empty tensor in host memory, from which a device can fetch by itself; an ordinary one where there is no
    such memory.

    shape: the tensor's.
    dtype: the tensor's.
    device: what the tensor's contents will be copied to.
    """
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=_locks_pages(device.type))


@cache
def _locks_pages(kind: str) -> bool:
    if kind in ("cpu", "meta", "mps"):  # MPS shares the machine's memory
        return False
    try:
        return torch.empty(1, pin_memory=True).is_pinned()
    except (RuntimeError, NotImplementedError):
        return False


class CopyStream:
    """Copies to one device beside its other work. Where a device has no streams, each copy is done at once.

    The usual walk with two buffers in turn: start the copy of chunk k + 1, wait for that of chunk k, work on chunk k.
    """

    def __init__(self, device: torch.device) -> None:
        """device: where copies go."""
        self._device = device
        self._stream = _new_stream(device)
        self._staging: list[tuple[torch.Tensor, Any]] = []

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Starts a copy, which begins when the device has done what it has been told so far, since that may still read
        the target. Returns what `wait` takes.

        target: on the device, of the source's shape and dtype.
        source: in host memory. It is not changed before the copy is done. Where its pages are not locked, it passes
            through locked memory first.
        """
        if self._stream is None:
            target.copy_(source)
            return None
        buffer = None if source.is_pinned() else self._staging_buffer(source.nbytes)
        if buffer is not None:
            source = buffer[: source.nbytes].view(source.dtype).view(source.shape).copy_(source)
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            target.copy_(source, non_blocking=True)
            done = self._stream.record_event()
        if buffer is not None:
            self._staging.append((buffer, done))
        return done

    def wait(self, copy: Any) -> None:
        """Has everything that the device is told from now on come after a copy.

        copy: what `copy` returned.
        """
        if copy is not None:
            torch.accelerator.current_stream(self._device).wait_event(copy)

    def _staging_buffer(self, size: int) -> torch.Tensor:
        """Locked memory of at least so many bytes that no copy reads any more. There are two pieces, in turn."""
        if len(self._staging) >= _BUFFERS:
            buffer, done = self._staging.pop(0)
            done.synchronize()
            if buffer.nbytes >= size:
                return buffer
        return page_locked([size], torch.uint8, self._device)


def _new_stream(device: torch.device) -> torch.Stream | None:
    """A stream of its own; None where the kind of device has none."""
    if not is_accelerator(device) or not hasattr(torch.get_device_module(device.type), "Stream"):
        return None
    return torch.Stream(device)
