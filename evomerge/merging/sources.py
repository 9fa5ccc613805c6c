"""Source: a model taken into a search, read from safetensors only.

`locate` turns a reference (`zoo:math`, a folder, a Hugging Face id) into a folder; `tensor_table` reads names, shapes
and dtypes from the file headers alone; `preflight` compares them before any weight is read. Pickled weights are never
opened.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge import zoo
from evomerge.errors import InputError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim", "n_head")
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what it is, without its values."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def locate(reference: str) -> Path:
    """The folder of a model reference. Raises InputError where there is none."""
    if reference.startswith("zoo:"):
        return zoo.path(reference.removeprefix("zoo:"))
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{reference}: expected a model folder, got a file; name the folder that holds config.json.")
    if reference.startswith((".", "/", "~")) or reference.count("/") != 1:
        raise InputError(
            f"{reference}: no such model folder; give a folder, a Hugging Face id (owner/name) or zoo:NAME "
            f"({', '.join(zoo.names())})."
        )
    return _download(reference)


def _download(reference: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    identifier, _, revision = reference.partition("@")
    try:
        return Path(snapshot_download(identifier, revision=revision or None, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise InputError(
            f"{reference}: no such folder here, and the Hugging Face hub gave no such model ({reason}); "
            "check the name, or the network."
        ) from None


def model_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder}: config.json is missing; a model folder holds config.json and weights.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); repair or download it again.") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"{path}: model_type is missing; expected the config.json of a Hugging Face model.")
    return config


def tensor_table(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a model folder by name, from the safetensors headers."""
    table: dict[str, TensorInfo] = {}
    for file in _weight_files(folder):
        table |= _header(file)
    return table


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: not a readable safetensors index ({error}); download it again.") from None
        for name in names:
            if Path(name).name != name or name in ("", ".."):
                raise InputError(f"{index}: shard '{name}' lies outside the model folder; refused.")
            if not (folder / name).exists():
                raise InputError(f"{folder}: shard {name} named by {INDEX} is missing; download it again.")
        return [folder / name for name in names]
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise InputError(
            f"{folder}: weights are pickled ({pickles[0]}), and a pickle can run code when it is opened; "
            "convert them to safetensors (model.save_pretrained) first."
        )
    raise InputError(f"{folder}: holds no {WEIGHTS}; expected a Hugging Face model in safetensors.")


def _header(file: Path) -> dict[str, TensorInfo]:
    """The safetensors header: 8 bytes of length, then JSON; checked against the file's size."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > 100_000_000:
                raise ValueError("its header is longer than 100 MB")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if file.stat().st_size != 8 + length + end:
            raise ValueError(f"expected {8 + length + end} bytes, got {file.stat().st_size}")
        return {name: TensorInfo(file, str(entry["dtype"]), tuple(entry["shape"])) for name, entry in header.items()}
    except (OSError, struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: not a valid safetensors file ({error}); copy or download it again.") from None


def preflight(base: str, models: Mapping[str, str]) -> None:
    """Raises InputError at the first difference between the base and a model that makes them unmergeable.

    models: how to call each model in a message, with its reference.
    """
    base_folder = locate(base)
    base_config, base_table = model_config(base_folder), tensor_table(base_folder)
    _check_floats(base, base_table)
    for label, reference in models.items():
        folder = locate(reference)
        config, table = model_config(folder), tensor_table(folder)
        if config["model_type"] != base_config["model_type"]:
            raise InputError(
                f"{label} is a {config['model_type']} model, but the base ({base}) is a "
                f"{base_config['model_type']} model; only fine-tunes of one base can be merged."
            )
        _check_tables(label, table, base, base_table)
        _check_floats(label, table)
        _check_heads(label, config, base, base_config)


def _check_heads(label: str, config: Mapping[str, Any], base: str, base_config: Mapping[str, Any]) -> None:
    """Tensors of one shape mean different things under other numbers of heads."""
    for key in HEADS:
        if config.get(key) != base_config.get(key):
            raise InputError(
                f"{label}: {key} in config.json is {config.get(key)}, but the base ({base}) has "
                f"{base_config.get(key)}; only fine-tunes of one base can be merged."
            )


def _check_tables(label: str, table: Mapping[str, TensorInfo], base: str, base_table: Mapping[str, TensorInfo]) -> None:
    for tensor, info in base_table.items():
        if tensor not in table:
            raise InputError(
                f"{label} lacks the tensor {tensor} of the base ({base}); only whole fine-tunes can be merged, so save "
                "it with all of its weights."
            )
        if table[tensor].shape != info.shape:
            raise InputError(
                f"{label}: {tensor} has shape {list(table[tensor].shape)}, but the base ({base}) has "
                f"{list(info.shape)}; only models of one shape can be merged."
            )
    extra = sorted(set(table) - set(base_table))
    if extra:
        raise InputError(
            f"{label} has the tensor {extra[0]}, which the base ({base}) lacks; name the base that it was tuned from."
        )


def _check_floats(reference: str, table: Mapping[str, TensorInfo]) -> None:
    for tensor, info in table.items():
        if info.dtype not in FLOATS:
            raise InputError(
                f"{reference}: {tensor} is stored as {info.dtype}; only floating-point weights can be merged "
                f"({', '.join(FLOATS)}), so dequantize the model first."
            )


def load_tensors(folder: Path, device: str = "cpu") -> "dict[str, torch.Tensor]":
    """Every tensor of a model folder, memory-mapped on the CPU, in its storage dtype."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, torch.Tensor] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(str(file), framework="pt", device=device) as stream:
                for name in stream.keys():  # noqa: SIM118 - safe_open is no mapping
                    tensors[name] = stream.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: cannot be read ({error}); copy or download it again.") from None
    return tensors
