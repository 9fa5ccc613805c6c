"""A pretended accelerator: devices named `pretend:N` on torch's PrivateUse1 key, whose tensors compute on the CPU.

For tests alone, in a process of its own, since torch can have one such device and keeps it. Its tensors answer to their
own device, refuse to be mixed with those of another device, and are counted: copies to and from a device, and the bytes
that live there with their peak. Results have the bits of the CPU, so whatever differs was computed somewhere else.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
_KEPT: list[Any] = []  # what must live as long as the process
_aten = torch.ops.aten
_CROSSING = {_aten.copy_.default, _aten._to_copy.default}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # which take their indices from the CPU, too


class Module:
    """What torch calls `torch.pretend`.

    devices: how many there are.
    room: how many bytes each has.
    refused: dtypes that the devices do not have.
    live, peak: bytes of tensors by device's number, now and at most.
    copies: copies of more than one element, by where from and where to.
    """

    devices = 2
    room = 1 << 40
    refused: ClassVar[set[torch.dtype]] = set()
    live: ClassVar[Counter[int]] = Counter()
    peak: ClassVar[Counter[int]] = Counter()
    copies: ClassVar[Counter[tuple[str, str]]] = Counter()

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """The devices draw from the CPU's generator, which torch seeds itself."""

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    def device_count(self) -> int:
        return self.devices

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]  # asked for by checkpoints of layers

    def synchronize(self, device: object = None) -> None:
        """All work is done at once."""

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return self.room - self.live[device.index or 0], self.room

    def memory_allocated(self, device: torch.device) -> int:
        return self.live[device.index or 0]

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.peak[device.index or 0]

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.peak[device.index or 0] = self.live[device.index or 0]


class Block:
    """Memory of a device, for as long as a tensor uses it."""

    of: ClassVar[WeakValueDictionary[tuple[int, int], "Block"]] = WeakValueDictionary()

    def __init__(self, storage: torch.UntypedStorage, number: int) -> None:
        self.storage, self.number, self.size = storage, number, storage.nbytes()
        Module.live[number] += self.size
        Module.peak[number] = max(Module.peak[number], Module.live[number])

    def __del__(self) -> None:
        if Module is not None:  # the process ends
            Module.live[self.number] -= self.size

    @classmethod
    def under(cls, raw: torch.Tensor, number: int) -> "Block":
        storage = raw.untyped_storage()
        block = cls.of.get((storage._cdata, number))
        if block is None:
            block = cls.of[storage._cdata, number] = cls(storage, number)
        return block


class Pretended(torch.Tensor):
    """A tensor of a pretended device.

    raw: its data, on the CPU.
    """

    raw: torch.Tensor
    block: Block

    @staticmethod
    def __new__(cls, raw: torch.Tensor, device: torch.device) -> "Pretended":
        if raw.dtype in Module.refused:
            raise TypeError(f"a {NAME} device has no {raw.dtype}")
        number = device.index or 0
        if number >= Module.devices:
            raise RuntimeError(f"there is no {NAME}:{number}")
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, number),
        )
        tensor.raw, tensor.block = raw, Block.under(raw, number)
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]  # torch's own subclasses take no contents either
        return f"{self.raw!r} on {self.device}"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _INSTEAD.get(func, func)(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares a plain function, and calls a class method
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _kernels(func.name()) == (False, True):  # such operations come here as they are only in inference mode
            with torch._C.DisableTorchFunctionSubclass():
                return func.decompose(*args, **kwargs)
        here = _place(func, args, kwargs)
        target = torch.device(kwargs.get("device") or here)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        flat = [item for item in tree_iter((args, kwargs)) if isinstance(item, Pretended)]
        _count_copy(func, args, here, target)
        plain_args, plain_kwargs = tree_map_only(Pretended, lambda tensor: tensor.raw, (args, kwargs))
        shapes = [tensor.raw.shape for tensor in flat]
        result = func(*plain_args, **plain_kwargs)
        if any(tensor.raw.shape != shape for tensor, shape in zip(flat, shapes, strict=True)):
            raise NotImplementedError(f"{func} changes a tensor's shape")
        if target.type == "cpu":
            return args[0] if func is _aten.copy_.default else result
        written = {id(tensor.raw): tensor for tensor in flat}
        return tree_map_only(
            torch.Tensor, lambda raw: written.get(id(raw)) if id(raw) in written else cls(raw, target), result
        )


@cache
def _kernels(name: str) -> tuple[bool, bool]:
    """Whether an operation has code of its own for the CPU, and a composition of others that serves every device."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(name, "CPU"), has(name, "CompositeImplicitAutograd")


def _place(func: Any, args: Any, kwargs: Any) -> torch.device:
    """The device that an operation works on. Raises RuntimeError where its tensors are not all there."""
    if func in _CROSSING:
        crossing: torch.Tensor = args[0]
        return crossing.device
    tensors = [item for item in tree_iter((args, kwargs)) if isinstance(item, torch.Tensor)]
    here = next(tensor.device for tensor in tensors if isinstance(tensor, Pretended))
    if func.overloadpacket.__name__ in _INDEXING:
        tensors = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    for tensor in tensors:
        if tensor.device != here and (isinstance(tensor, Pretended) or tensor.dim()):
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, but there are {here} and {tensor.device}"
            )
    return here


def _count_copy(func: Any, args: Any, here: torch.device, target: torch.device) -> None:
    source = args[1] if func is _aten.copy_.default else args[0]
    start = source.device if func is _aten.copy_.default else here
    if func in _CROSSING and start != target and source.numel() > 1:
        Module.copies[str(start), str(target)] += 1


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention by the kernel that the CPU would take, which torch chooses by the kind of device."""
    given = tree_map_only(Pretended, lambda tensor: tensor.raw, (query, key, value, attn_mask))
    follows = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    q, k, v = (tensor.detach().requires_grad_(follows) for tensor in given[:3])
    choice = torch._fused_sdp_choice(q, k, v, given[3], dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if choice != 1:  # no fused kernel
        return _aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
    return _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


def _as_list(tensor: torch.Tensor) -> Any:
    return tensor.cpu().tolist()  # which torch refuses to do for tensors of other classes


_INSTEAD: dict[Any, Callable[..., Any]] = {
    torch.nn.functional.scaled_dot_product_attention: _attention,
    torch.Tensor.tolist: _as_list,
}


def _factories() -> Iterator[tuple[str, Any]]:
    """The operations that make tensors of nothing, which no tensor can catch: name and operation."""
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        types = [str(argument.type) for argument in schema.arguments]
        named = {argument.name for argument in schema.arguments}
        if space == "aten" and "device" in named and not any("Tensor" in kind for kind in types):
            packet = getattr(_aten, name, None)
            operation = getattr(packet, schema.overload_name or "default", None) if packet is not None else None
            if operation is not None and str(schema.returns[0].type) == "Tensor":
                yield f"{name}.{schema.overload_name}".rstrip("."), operation


def _making(operation: Any) -> Callable[..., Any]:
    def make(*args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> Pretended:
        return Pretended(operation(*args, device=torch.device("cpu"), **kwargs), torch.device(device or NAME))

    return make


def _chosen_by_kind() -> Iterator[tuple[str, Any]]:
    """The operations for which the CPU has code of its own, and other devices a composition of further operations:
    name and operation."""
    for full in torch._C._dispatch_get_all_op_names():
        space, _, name = full.partition("::")
        if space == "aten" and _kernels(full) == (True, True):
            packet, _, overload = name.partition(".")
            yield name, getattr(getattr(_aten, packet), overload or "default")


def _dispatching(operation: Any) -> Callable[..., Any]:
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        return Pretended.__torch_dispatch__(operation, (), args, kwargs)

    return dispatch


def _copy_from(source: torch.Tensor, target: Pretended, non_blocking: bool = False) -> Pretended:
    """A copy where torch asks no tensor's class, as in `torch.tensor`."""
    target.raw.copy_(source.raw if isinstance(source, Pretended) else source)
    return target


def install() -> Module:
    """Makes the devices known to torch."""
    module = Module()
    torch.autograd.set_multithreading_enabled(False)  # torch's threads for backward passes know one such device
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    make: Any = torch.library.Library
    library = make("aten", "IMPL")
    for name, operation in _factories():
        library.impl(name, _making(operation), "PrivateUse1")
    for name, operation in _chosen_by_kind():
        library.impl(name, _dispatching(operation), "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    _KEPT.append(library)
    return module
