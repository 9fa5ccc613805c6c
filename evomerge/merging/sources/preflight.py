"""Whether models can be merged, by their configs and headers, before any weight is read."""

from collections.abc import Collection, Mapping

from evomerge.errors import InputError
from evomerge.merging.naming import naming_in
from evomerge.merging.sources.model_settings import check_settings
from evomerge.merging.sources.models import Models
from evomerge.merging.sources.tensor_files import FLOATS, TensorInfo
from evomerge.merging.sources.weights import HEAD_NAMES, Weights, with_head


def preflight(
    models: Models,
    labels: Mapping[str, str] | None = None,
    same_tensors: bool = True,
    same_vocabulary: bool = True,
) -> list[str]:
    """Warnings about models whose configs differ from the base's.

    models: the base, and the models that are merged with it.
    labels: what to call a model in a message, by reference; by default the reference.
    same_tensors: whether names and shapes have to be the base's too.
    same_vocabulary: whether tensors with one row per token have to have the base's rows.
    Raises InputError at the first difference that makes models unmergeable.
    """
    base, head = models.base, models.head
    base_table = with_head(base.weights, head)
    _check_floats(base.reference, base_table)
    by_token = frozenset() if same_vocabulary else naming_in(base.folder).vocabulary | set(HEAD_NAMES)
    warnings, own_heads = [], []
    for model in models.values():
        if model is base:
            continue
        label = (labels or {}).get(model.reference, model.reference)
        if model.kind != base.kind:
            raise InputError(
                f"{label} is a {model.kind} model, but the base ({base.reference}) is a {base.kind} model; only "
                "fine-tunes of one base can be merged."
            )
        if same_tensors:
            _check_rows(label, model.weights, base.reference, base_table)
            _check_tables(label, with_head(model.weights, head), base.reference, base_table, by_token)
        _check_floats(label, model.table)
        warnings.append(check_settings(label, model.config, base.reference, base.config))
        own_heads += [label] if model.weights.own_head is not None else []
    if head is not None and base.weights.own_head is None:
        warnings.append(
            f"{own_heads[0]} has a head of its own ({head}), which the base ({base.reference}) ties to its embedding: "
            "in a merge the two are tensors of their own."
        )
    return [warning for warning in warnings if warning]


def _check_rows(label: str, weights: Weights, base: str, base_table: Mapping[str, TensorInfo]) -> None:
    """Raises InputError for an adapter that resized the vocabulary, with a message of its own."""
    for name in weights.replaced:
        there, here = weights.table[name].shape, base_table[name].shape if name in base_table else ()
        if len(there) == len(here) == 2 and there[0] != here[0] and there[1:] == here[1:]:
            raise InputError(
                f"{label}: the adapter resized the vocabulary: its {name} has {there[0]} rows, but the base ({base}) "
                f"has {here[0]}; resize the base's embeddings alike (resize_token_embeddings), save it and name that, "
                "or train the adapter without new tokens."
            )


def _check_tables(
    label: str,
    table: Mapping[str, TensorInfo],
    base: str,
    base_table: Mapping[str, TensorInfo],
    by_token: Collection[str],
) -> None:
    """Raises InputError for tensors that the base has not alike; those that are `by_token` may have other rows."""
    for tensor, info in base_table.items():
        if tensor not in table:
            raise InputError(
                f"{label} lacks the tensor {tensor} of the base ({base}); only whole fine-tunes can be merged, so save "
                "it with all of its weights."
            )
        there, here = table[tensor].shape, info.shape
        if there != here and (tensor not in by_token or there[1:] != here[1:]):
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
