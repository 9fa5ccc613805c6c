"""Whether models can be merged, by their configs and headers, before any weight is read."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from evomerge.errors import InputError
from evomerge.merging.sources.model_settings import check_settings
from evomerge.merging.sources.tensor_files import FLOATS as FLOATS
from evomerge.merging.sources.tensor_files import TensorInfo as TensorInfo

if TYPE_CHECKING:
    pass
from evomerge.merging.sources.references import find_source
from evomerge.merging.sources.weights import Weights, model_config, untied_head, with_head


def preflight(base: str, models: Mapping[str, str], same_tensors: bool = True) -> list[str]:
    """Warnings about models whose configs differ from the base's; raises InputError at the first difference that makes
    them unmergeable.

    models: how to call each model in a message, with its reference. same_tensors: whether names and shapes have to be
    the base's too.
    """
    base_source = find_source(base, base)
    base_weights = Weights(base_source)
    sources = {label: Weights(find_source(reference, base)) for label, reference in models.items()}
    head = untied_head([base_weights, *sources.values()])
    base_config, base_table = model_config(base_source.folder), with_head(base_weights, head)
    _check_floats(base, base_table)
    warnings = []
    for label, weights in sources.items():
        config = model_config(weights.source.folder)
        if config["model_type"] != base_config["model_type"]:
            raise InputError(
                f"{label} is a {config['model_type']} model, but the base ({base}) is a "
                f"{base_config['model_type']} model; only fine-tunes of one base can be merged."
            )
        if same_tensors:
            _check_rows(label, weights, base, base_table)
            _check_tables(label, with_head(weights, head), base, base_table)
        _check_floats(label, weights.table)
        warnings.append(check_settings(label, config, base, base_config))
    if head is not None and base_weights.own_head is None:
        names = [label for label, weights in sources.items() if weights.own_head is not None]
        warnings.append(
            f"{names[0]} has a head of its own ({head}), which the base ({base}) ties to its embedding: in a merge the "
            "two are tensors of their own."
        )
    return [warning for warning in warnings if warning]


def _check_rows(label: str, weights: Weights, base: str, base_table: Mapping[str, TensorInfo]) -> None:
    """Tells an adapter that resized the vocabulary as that."""
    for name in weights.replaced:
        there, here = weights.table[name].shape, base_table[name].shape if name in base_table else ()
        if len(there) == len(here) == 2 and there[0] != here[0] and there[1:] == here[1:]:
            raise InputError(
                f"{label}: the adapter resized the vocabulary: its {name} has {there[0]} rows, but the base ({base}) "
                f"has {here[0]}; resize the base's embeddings alike (resize_token_embeddings), save it and name that, "
                "or train the adapter without new tokens."
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
