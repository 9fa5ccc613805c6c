"""Placement: which part of a model is on which of a worker's devices.

accelerate decides how the model is divided, and torch's own hooks carry data from one part to the next. (accelerate's
hooks bind a new `forward` to a module, and a view copies modules, so its hooks would run the wrong one.) The sources'
tensors of a parameter are on the parameter's device.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from evomerge.devices import free_memory
from evomerge.errors import InputError
from evomerge.layers import is_layer
from evomerge.quiet import quiet

_KEPT = 0.9  # the share of a device's free memory for a model and its sources; candidates take some, too
_STAYS = "past_key_values"  # the cache is not moved: it keeps each layer's keys and values where the layer is


def place(model: nn.Module, devices: Sequence[torch.device], copies: int) -> None:
    """Moves a model to devices, layer by layer where there are several; the embeddings go to the first.

    model: on the CPU, or on the meta device.
    devices: where it goes.
    copies: how many tensors of a parameter's size there will be, the parameter and those of the sources.
    Raises InputError where the devices have too little memory.
    """
    if len(devices) == 1:
        model.to(devices[0])
        return
    numbers = divide(model, [_room(device) for device in devices], copies)
    for name, part in parts(model).items():
        part.to(devices[numbers[name]])
        part.register_forward_pre_hook(_fetch, with_kwargs=True)


def divide(model: nn.Module, room: Sequence[float], copies: int) -> dict[str, int]:
    """The number of the device of each part of a model, by the part's name. Parts stay in the model's order, and each
    device gets about as much.

    model: the model to divide.
    room: how many bytes each device has.
    copies: how many tensors of a parameter's size there will be.
    Raises InputError where the devices have too little memory.
    """
    from accelerate import infer_auto_device_map

    by_name = parts(model)
    sizes = [_size(part) for part in by_name.values()]
    whole, share = _size(model), _size(model) / len(room) + max(sizes)
    limits = [min(space / copies, share) for space in room[:-1]] + [min(room[-1] / copies, whole)]
    layers = {type(part).__name__ for name, part in by_name.items() if is_layer(name)}
    with quiet():
        decided = infer_auto_device_map(
            model, {number: int(limit) for number, limit in enumerate(limits)}, sorted(layers), clean_result=False
        )
    numbers = {name: decided[_longest_prefix(name, decided)] if _size(part) else 0 for name, part in by_name.items()}
    if not all(isinstance(number, int) for number in numbers.values()):
        raise InputError(
            f"workers.num_gpus is {len(room)}, but {copies} times {whole / 2**30:.1f} GiB of weights (the sources and "
            f"the merge) do not fit on so many GPUs, which have {sum(room) / 2**30:.1f} GiB free; give each worker "
            "more of them, or merge fewer models."
        )
    return numbers


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that each stay on one device, by name: layers, and other modules that have tensors of their own."""
    by_name: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{part}.") for part in by_name):
            continue
        if is_layer(name) or any(True for _ in chain(module.parameters(recurse=False), module.buffers(recurse=False))):
            by_name[name] = module
    return by_name


def _size(module: nn.Module) -> int:
    """How many bytes a module's parameters have. Buffers are small, and layers share some of them."""
    return sum(parameter.nbytes for parameter in module.parameters())


def _longest_prefix(name: str, keys: dict[str, Any]) -> str:
    return max((key for key in keys if key in ("", name) or name.startswith(f"{key}.")), key=len)


def _room(device: torch.device) -> float:
    return _KEPT * free_memory(device)


def _fetch(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A part's inputs, moved to its device."""
    from accelerate.utils import send_to_device

    device = next(chain(module.parameters(), module.buffers())).device
    return send_to_device(args, device), send_to_device(kwargs, device, skip_keys=_STAYS)
