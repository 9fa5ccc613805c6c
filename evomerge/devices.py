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
    """`auto` stands for the dtype that most tensors of the base are stored in."""
    if dtype != "auto":
        return dtype
    stored = Counter(FLOATS[info.dtype] for info in tensors.values()).most_common(1)[0][0]
    return "float32" if stored == "float64" else stored


def resolve_compile(wanted: bool | str, device: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether merges are compiled: where that pays for the seconds that it takes, and changes no bit."""
    compiler = os.environ.get("CXX", "g++")
    found = shutil.which(compiler) is not None
    if wanted is True and device == "cpu" and not found:
        raise InputError(
            f"evaluation.compile is true, but there is no C++ compiler ({compiler}); install one, or set it to false."
        )
    if wanted != "auto":
        return bool(wanted)
    return device == "cpu" and found and sum(math.prod(info.shape) for info in tensors.values()) >= _WORTH_COMPILING


def resolve_device(name: str, key: str = "evaluation.device") -> str:
    """The device that `auto` stands for here. Raises InputError for one that is not there, naming the key that asks."""
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
    """Over how many GPUs a worker spreads its models. Raises InputError where they are not there."""
    wanted = int(config.workers.num_gpus or 1)
    if wanted <= 1 or device != "cuda":
        return 1
    if wanted > torch.cuda.device_count():
        raise InputError(
            f"workers.num_gpus is {wanted}, but torch sees {torch.cuda.device_count()} CUDA devices here; lower it."
        )
    return wanted
