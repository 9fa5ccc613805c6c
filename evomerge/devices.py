"""What `auto` stands for on this machine: the device, the dtype, and whether merges are compiled."""

import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping

import torch

from evomerge.config.search import SearchConfig
from evomerge.errors import InputError
from evomerge.merging.sources.tensor_files import FLOATS, TensorInfo

_WORTH_COMPILING = 50_000_000  # parameters


def resolve_dtype(dtype: str, tensors: Mapping[str, TensorInfo]) -> str:
    """The dtype of models in memory: for `auto`, the one that most tensors are stored in, but no wider than float32.

    dtype: as the search file says.
    tensors: the base's tensors, by name.
    """
    if dtype != "auto":
        return dtype
    stored = Counter(FLOATS[info.dtype] for info in tensors.values()).most_common(1)[0][0]
    return "float32" if stored == "float64" else stored


def resolve_compile(wanted: bool | str, device: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether merges are compiled; `auto` compiles where it saves more time than it takes, and changes no bit.

    wanted: as the search file says.
    device: the resolved device.
    tensors: the base's tensors, by name.
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
    large = sum(math.prod(info.shape) for info in tensors.values()) >= _WORTH_COMPILING
    return device == "cpu" and available and large


def resolve_device(name: str, key: str = "evaluation.device") -> str:
    """The device to use; `auto` is a GPU where there is one, else the CPU.

    name: as a user gives it.
    key: where the user gives it, which opens an error's message.
    Raises InputError for a device that does not exist here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()) or name.endswith(":"):
        raise InputError(f"{key} is '{name}'; use auto, cpu, cuda or cuda:N.")
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= seen:
        raise InputError(f"{key} is '{name}', but torch sees {seen} CUDA devices here; use auto or cpu.")
    return name


def count_gpus(config: SearchConfig, device: str) -> int:
    """How many GPUs a worker divides its models over.

    config: says how many GPUs a worker has.
    device: the resolved device.
    Raises InputError where there are fewer GPUs here.
    """
    wanted = int(config.workers.num_gpus or 1)
    if wanted <= 1 or device != "cuda":
        return 1
    if wanted > torch.cuda.device_count():
        raise InputError(
            f"workers.num_gpus is {wanted}, but torch sees {torch.cuda.device_count()} CUDA devices here; lower it."
        )
    return wanted
