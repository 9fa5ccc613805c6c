"""Building models from their configs, with transformers and without code from their folders.

A model is a causal language model, or a model that writes text about images and contains a language model. Where
transformers has both for a config, `architectures` in config.json decides.
"""

import copy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import InputError
from evomerge.quiet import quiet

if TYPE_CHECKING:
    import torch

_AUTO = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


def load_config(folder: Path) -> Any:
    """The transformers config of a model folder, read without code from the folder.

    Raises InputError where transformers cannot read it.
    """
    try:
        with quiet():
            from transformers import AutoConfig

            return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a config is checked by several libraries, each with its own exceptions
        raise _refusal(folder, "build", error) from None


def empty_model(config: Any, folder: Path) -> Any:
    """The model of a config, on PyTorch's meta device, so without weights.

    config: a transformers config.
    folder: the model's folder, which opens an error's message.
    Raises InputError where transformers cannot build it.
    """
    import torch

    try:
        with quiet(), torch.device("meta"):
            return _auto_class(config).from_config(copy.deepcopy(config), trust_remote_code=False)
    except Exception as error:
        raise _refusal(folder, "build", error) from None


def load_model(folder: Path, dtype: "torch.dtype", config: Any = None) -> Any:
    """The model in a folder, loaded from safetensors, without code from the folder.

    folder: a model folder.
    dtype: the dtype of the weights in memory.
    config: a transformers config to use instead of the folder's.
    Raises InputError where transformers cannot load it.
    """
    kind = _auto_class(config or load_config(folder))
    given = {} if config is None else {"config": config}
    try:
        with quiet():
            model: Any = kind.from_pretrained(
                str(folder), dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True, **given
            )
    except Exception as error:
        raise _refusal(folder, "load", error) from None
    model.eval()
    return model


def _auto_class(config: Any) -> Any:
    """The auto class that has the class named by the config's `architectures`; otherwise the first one that has any
    class for the config."""
    import transformers

    kind: Any = type(config)  # mypy takes no class for hashable
    by_auto = {name: _classes(getattr(transformers, name), kind) for name in _AUTO}
    named = [name for name, classes in by_auto.items() if classes & set(config.architectures or ())]
    return getattr(transformers, next(iter([*named, *(name for name in by_auto if by_auto[name]), _AUTO[0]])))


@cache
def _classes(auto: Any, config: type) -> set[str]:
    """The names of the classes that an auto class has for a kind of configs."""
    mapping = auto._model_mapping
    if config not in mapping:
        return set()
    classes = mapping[config]
    return {kind.__name__ for kind in (classes if isinstance(classes, tuple) else (classes,))}


def _refusal(folder: Path, what: str, error: Exception) -> InputError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
    return InputError(f"{folder}: transformers cannot {what} this model ({reason}); check its config.json.")
