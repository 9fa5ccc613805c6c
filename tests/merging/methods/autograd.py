"""Merges in float64, written a second time, that autograd can follow. They share only the masks with the package."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from evomerge.merging.methods import METHODS
from evomerge.merging.methods.base import Inputs, Method
from evomerge.merging.methods.parts import whole_of
from evomerge.merging.methods.sparsify import SPARSIFIERS
from evomerge.merging.methods.task_vectors import TaskVectorMerge, _scale
from tests.merging.methods import derived

Leaves = Mapping[tuple[str, int | None], torch.Tensor]


def masks(method: Method, inputs: Inputs) -> list[torch.Tensor]:
    """What each task vector is multiplied by before its weight: the mask, and the factor that makes up for it."""
    function = method.function
    assert isinstance(function, TaskVectorMerge)
    assert inputs.base is not None
    kept = []
    for index, tensor in enumerate(inputs.tensors):
        delta = (tensor.float() - inputs.base.float()).flatten()
        if function.sparsify is None:
            kept.append(torch.ones(tensor.shape, dtype=torch.float64))
            continue
        sparsifier = SPARSIFIERS[function.sparsify]
        values = sparsifier.numbers(inputs, index)
        numbers = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in values.items()}
        fields = sparsifier.fields(inputs, index)
        mask = sparsifier.keep(delta.clone(), fields, numbers).double()
        if inputs.shared["rescale"]:
            probability = sparsifier.probability(fields, numbers) if inputs.rescale == "density" else None
            factor = _scale(inputs, index, function.sparsify, values) if probability is None else 1 / probability
            mask = mask * torch.as_tensor(factor).double()
        kept.append(mask.reshape(tensor.shape))
    return kept


def with_weighted_rows(inputs: Inputs) -> Inputs:
    """The same inputs with the weighted rows written out, float32."""
    assert inputs.base is not None
    base, tensors = whole_of(inputs.base).float(), []
    for index, tensor in enumerate(inputs.tensors):
        learned = inputs.statistic("row_weights", index)
        assert learned is not None
        tensors.append(base + whole_of(learned.values).view(-1, 1) * (whole_of(tensor).float() - base))
    return replace(inputs, tensors=tuple(tensors))


def merged(method: Method, inputs: Inputs, leaves: Leaves) -> torch.Tensor:
    """The merge in float64, as papers write it."""
    plain, _, step = method.name.partition("+")
    if step == "rows":
        return merged(METHODS[plain], with_weighted_rows(inputs), leaves)
    if step:
        assert inputs.base is not None
        activations = inputs.statistic("activations", -1)
        assert activations is not None
        shares = torch.as_tensor(activations.values).double() / float(torch.as_tensor(activations.values).max())
        origin = inputs.base.double()  # type: ignore[union-attr]
        return origin + (merged(METHODS[plain], inputs, leaves) - origin) * (1 - shares * (1 - inputs.shared["omega"]))
    base = inputs.base.double() if inputs.base is not None else None
    models = [tensor.double() for tensor in inputs.tensors]
    if method.name == "linear":
        weights = [leaves["weight", index] for index in range(len(models))]
        total = sum(weight * model for weight, model in zip(weights, models, strict=True))
        return total / sum(weights) if inputs.shared["normalize"] else total  # type: ignore[operator, return-value]
    if method.name == "passthrough":
        return models[0] * leaves["scale", 0]
    if method.name in ("slerp", "nuslerp"):
        return arc(method, inputs, leaves)
    if method.name == "multislerp":
        return barycenter(inputs, leaves)
    assert base is not None
    if method.name == "nearswap":
        away = base - models[0]
        return base - away * torch.clamp(leaves["t", None] / away.abs().clamp(min=1e-9), max=1.0)
    if not method.mergekit:
        return derived_again(method, inputs, leaves)
    weights = [leaves["weight", index] for index in range(len(models))]
    kept = masks(method, inputs)
    deltas = [(model - base) * mask for model, mask in zip(models, kept, strict=True)]
    weighted = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
    function = method.function
    assert isinstance(function, TaskVectorMerge)
    total = torch.stack(weighted).sum(0)
    if function.consensus:
        elected = torch.where(total.detach() >= 0, 1.0, -1.0)
        agree = [
            ((delta if weight == 0 else own).detach() * elected > 0).double()
            for own, delta, weight in zip(weighted, deltas, weights, strict=True)
        ]
        total = sum(own * mine for own, mine in zip(weighted, agree, strict=True))  # type: ignore[assignment]
        if inputs.shared["normalize"]:
            by = sum(weight * mine for weight, mine in zip(weights, agree, strict=True))
            total = total / torch.where(by.detach() == 0, 1.0, by)  # type: ignore[union-attr, arg-type]
    elif inputs.shared["normalize"]:
        total = total / sum(weights)
    return base + leaves["lambda", None] * total


def derived_again(method: Method, inputs: Inputs, leaves: Leaves) -> torch.Tensor:
    """A method that mergekit has not: linear in its parts, which NumPy derives (derived.py)."""
    assert inputs.base is not None
    base, own = inputs.base.double(), inputs.per_model
    deltas = [(tensor.double() - base).numpy() for tensor in inputs.tensors]
    models, alone = range(len(deltas)), np.eye(len(deltas))
    if method.name in ("fisher", "gradient_matching"):
        return weighed_by_information(method, inputs, leaves)
    whole = method.name in ("tsv", "iso", "wudi", "ace")
    if whole and not (inputs.in_layer and deltas[0].ndim == 2):  # their authors average what is no matrix of a layer
        ones = [leaves["alpha", None]] * len(deltas) if ("alpha", None) in leaves else None
        weights = ones or [leaves["weight", index] * leaves["lambda", None] for index in models]
        return base + sum(w * torch.from_numpy(d) for w, d in zip(weights, deltas, strict=True)) / len(deltas)
    if ("alpha", None) in leaves:
        part = derived.iso(deltas) if method.name == "iso" else derived.ace(deltas, inputs.shared["eps"])
        return base + leaves["alpha", None] * torch.from_numpy(part)
    if method.name == "consensus":
        thresholds = [values["threshold"] for values in own]
        parts = [derived.consensus(deltas, alone[i].tolist(), thresholds, inputs.shared["agree"]) for i in models]
    elif method.name == "localize_and_stitch":
        densities = [values["density"] for values in own]
        parts = [derived.localize_and_stitch(deltas, alone[i].tolist(), densities) for i in models]
    elif method.name.startswith("regmean"):
        kind = method.statistics[0].kind
        measured = [inputs.statistic(kind, i) for i in models]
        grams = [np.asarray(each.values, dtype=np.float64) for each in measured if each is not None]
        parts = [derived.regmean(deltas, alone[i].tolist(), grams, inputs.shared["alpha"]) for i in models]
    elif method.name == "wudi":
        parts = [derived.wudi(deltas, alone[i].tolist()) for i in models]
    else:
        parts = derived.tsv(deltas)
    total = sum(leaves["weight", index] * torch.from_numpy(part) for index, part in enumerate(parts))
    return base + leaves["lambda", None] * total


def weighed_by_information(method: Method, inputs: Inputs, leaves: Leaves) -> torch.Tensor:
    assert inputs.base is not None
    base = torch.as_tensor(inputs.base).double()
    models = range(len(inputs.tensors))

    def information(index: int) -> torch.Tensor:
        measured = inputs.statistic("fisher", index)
        assert measured is not None
        return torch.as_tensor(measured.values).double() / measured.mean

    weights = [leaves["weight", index] for index in models]
    deltas = [torch.as_tensor(tensor).double() - base for tensor in inputs.tensors]
    if method.name == "fisher":
        counts = [weights[index] * information(index).clamp(min=inputs.shared["floor"]) for index in models]
        pulled = sum(count * delta for count, delta in zip(counts, deltas, strict=True))
        return base + leaves["lambda", None] * pulled / sum(counts)
    own = information(-1) + inputs.shared["delta"]
    pulled = sum(weights[index] * (own + information(index)) * deltas[index] for index in models)
    return base + pulled / (own + sum(weights[index] * information(index) for index in models))


def arc(method: Method, inputs: Inputs, leaves: Leaves) -> torch.Tensor:
    """The point of the arc between two models, or between two task vectors."""
    models = [tensor.double() for tensor in inputs.tensors]
    origin: Any = 0.0
    if method.name == "slerp":
        assert inputs.base is not None
        t, ends = leaves["t", None], [inputs.base.double(), models[0]]
    else:
        t, ends = leaves["weight", 1] / (leaves["weight", 0] + leaves["weight", 1]), models
        if inputs.base is not None:
            origin = inputs.base.double()
            ends = [end - origin for end in ends]
    cosine = (ends[0] * ends[1]).sum() / (ends[0].norm() * ends[1].norm())
    if method.name == "slerp" and abs(cosine) > 0.9995:  # a straight line, as in mergekit
        return (1 - t) * ends[0] + t * ends[1]
    angle = torch.acos(cosine)
    point = torch.sin((1 - t) * angle) * ends[0] + torch.sin(t * angle) * ends[1]
    return origin + point / torch.sin(angle)


def barycenter(inputs: Inputs, leaves: Leaves) -> torch.Tensor:
    """The weighted mean in the tangent space at the normalized mean direction."""
    weights = torch.stack([leaves["weight", index] for index in range(len(inputs.tensors))])
    shares = weights / weights.sum() if inputs.shared["normalize_weights"] else weights
    origin = (
        inputs.base.double() if inputs.base is not None else torch.zeros(inputs.tensors[0].shape, dtype=torch.float64)
    )
    vectors = torch.stack([(tensor.double() - origin).flatten() for tensor in inputs.tensors])
    eps = inputs.shared["eps"]
    norms = vectors.norm(dim=1)
    units = vectors / (norms + eps)[:, None]
    mean = (shares[:, None] * units).sum(0)
    mean = mean / mean.norm()
    tangents = units - (units @ mean)[:, None] * mean
    step = (shares[:, None] * tangents).sum(0)
    angle = step.norm() + eps
    point = torch.cos(angle) * mean + torch.sin(angle) * step / angle
    return origin + (point * (shares * norms).sum()).reshape(origin.shape)


def leaves_of(method: Method, inputs: Inputs) -> dict[tuple[str, int | None], torch.Tensor]:
    """A float64 leaf for every parameter by which the method can be differentiated."""

    def leaf(value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float64, requires_grad=True)

    leaves: dict[tuple[str, int | None], torch.Tensor] = {
        (name, index): leaf(values[name])
        for name in method.slopes
        for index, values in enumerate(inputs.per_model)
        if method.takes(name)
    }
    return leaves | {(name, None): leaf(inputs.shared[name]) for name in method.slopes if method.shares(name)}
