"""Placement: which part of a model is on which of a worker's devices.

accelerate divides the model; what flows from one part to the next is carried by hooks of torch's own. (accelerate's
hooks replace a module's `forward` by one that is bound to it, and a view copies modules.) Whatever serves a parameter,
such as the sources' tensors, is to be where the parameter is.
"""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from evomerge.errors import InputError
from evomerge.layers import layer_index
from evomerge.quiet import quiet

_KEPT = 0.9  # of a device's free memory, for a model and its sources; candidates take some too
_STAYS = "past_key_values"  # the cache keeps each layer's part where the layer is


def place(model: nn.Module, devices: Sequence[torch.device], copies: int) -> None:
    """Moves a model to devices, layer by layer where there are several, the embeddings to the first.

    copies: how many tensors of its size will serve each parameter, itself among them.
    """
    if len(devices) == 1:
        model.to(devices[0])
        return
    numbers = divide(model, [_room(device) for device in devices], copies)
    for name, part in parts(model).items():
        part.to(devices[numbers[name]])
        part.register_forward_pre_hook(_fetch, with_kwargs=True)


def divide(model: nn.Module, room: Sequence[float], copies: int) -> dict[str, int]:
    """For each part of a model the number of its device: in the model's order, about as much on each.

    room: bytes that each device has. Raises InputError where they do not suffice.
    """
    from accelerate import infer_auto_device_map

    found = parts(model)
    sizes = [_size(part) for part in found.values()]
    whole, share = _size(model), _size(model) / len(room) + max(sizes)
    limits = [min(each / copies, share) for each in room[:-1]] + [min(room[-1] / copies, whole)]
    layers = {type(part).__name__ for name, part in found.items() if _is_layer(name)}
    with quiet():
        decided = infer_auto_device_map(
            model, {number: int(limit) for number, limit in enumerate(limits)}, sorted(layers), clean_result=False
        )
    numbers = {name: decided[_longest_prefix(name, decided)] if _size(part) else 0 for name, part in found.items()}
    if not all(isinstance(number, int) for number in numbers.values()):
        raise InputError(
            f"workers.num_gpus is {len(room)}, but {copies} times {whole / 2**30:.1f} GiB of weights (the sources and "
            f"the merge) do not fit on so many GPUs, which have {sum(room) / 2**30:.1f} GiB free; give each worker "
            "more of them, or merge fewer models."
        )
    return numbers


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """What stays on one device: each layer, and each other module that has tensors of its own."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{part}.") for part in found):
            continue
        if _is_layer(name) or any(True for _ in chain(module.parameters(recurse=False), module.buffers(recurse=False))):
            found[name] = module
    return found


def _is_layer(name: str) -> bool:
    return name.rpartition(".")[2].isdigit() and layer_index(f"{name}.weight") is not None


def _size(module: nn.Module) -> int:
    """Bytes of its parameters; buffers are small, and some of them are shared by all layers."""
    return sum(parameter.nbytes for parameter in module.parameters())


def _longest_prefix(name: str, known: dict[str, Any]) -> str:
    return max((key for key in known if key in ("", name) or name.startswith(f"{key}.")), key=len)


def _room(device: torch.device) -> float:
    return _KEPT * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def _fetch(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A part's inputs, brought to where it is."""
    from accelerate.utils import send_to_device

    device = next(chain(module.parameters(), module.buffers())).device
    return send_to_device(args, device), send_to_device(kwargs, device, skip_keys=_STAYS)
