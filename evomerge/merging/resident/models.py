"""ResidentModels: the sources in memory, and one model into whose parameters every candidate is written in place.

Sources are loaded once; a candidate costs one pass over each tensor, in float32, rounded once into the model's dtype,
and never touches the disk. A candidate of other layers is a view, which shares the tensors that it leaves unchanged.
What candidates have in common (uniform fields, thresholds, scalar products) is made on first use and kept.
"""

import mmap
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from evomerge.errors import CandidateFailed, InputError, choices
from evomerge.layers import layer_count, layer_index, with_layer
from evomerge.merging.building import empty_model, load_config, load_model
from evomerge.merging.methods.base import Inputs
from evomerge.merging.methods.kernels import as_field, checksum, uniform_field
from evomerge.merging.methods.passes import room_on
from evomerge.merging.naming import check_view, naming_of
from evomerge.merging.plan import MergePlan, TensorMerge, make_plan
from evomerge.merging.resident.placement import place
from evomerge.merging.resident.view import make_view
from evomerge.merging.skeleton import ties, untied
from evomerge.merging.sources.models import Models
from evomerge.merging.sources.tensor_files import FLOATS, TensorInfo
from evomerge.merging.sources.weights import Weights, untied_head
from evomerge.recipe import Recipe, TokenizerSettings

T = TypeVar("T")
_LARGE = 1 << 16  # bytes of what is worth pages of its own


class ResidentModels:
    """The models of a search on one device, or on several that share the work layer by layer."""

    def __init__(
        self,
        models: Models,
        device: str,
        dtype: str,
        compiled: bool = False,
        rehearsal: bool = False,
        count: int = 1,
        head_apart: bool = False,
    ) -> None:
        """models: those that recipes may name; the base's config is that of every merge. compiled:
        whether large tensors are merged by compiled code. rehearsal: everything is made on the meta device, without any
        data, as it would be on `device`. count: of the devices, the first ones of that kind. head_apart: whether the
        head is a tensor of its own even where all of the sources tie it to their embedding; where some do not it is."""
        self.devices = [torch.device(device)] if count == 1 else [torch.device(device, n) for n in range(count)]
        self.devices = [torch.device("meta")] if rehearsal else self.devices
        self.compiled = compiled and not rehearsal
        self._planes = compiled and torch.device(device).type == "cpu"
        self._room = room_on(torch.device(device))
        self._dtype: torch.dtype = getattr(torch, dtype)
        skeleton = self._folder = models.base.folder
        config = load_config(skeleton)
        weights = {reference: model.weights for reference, model in models.items()}
        apart = ties(config) and (head_apart or untied_head(weights.values()) is not None)
        config = untied(config) if apart else config
        self.model: Any = (
            empty_model(config, skeleton).to(self._dtype)
            if rehearsal
            else load_model(skeleton, self._dtype, *([config] if apart else []))
        )
        place(self.model, self.devices, 1 + len(models))
        self._naming = naming_of(config, skeleton)
        self._parameters = self._naming.weights(self.model)
        self._sources = {reference: self._resident(source) for reference, source in weights.items()}
        self._known: dict[Hashable, Any] = {}
        self._converted: dict[tuple[str, str, torch.device], torch.Tensor] = {}
        self.candidate: Any = self.model

    def _resident(self, weights: Weights) -> dict[str, torch.Tensor]:
        source, found_all = weights.source, {}
        for name, parameter in self._parameters.items():
            found = weights.find(name)
            if found is None:
                raise InputError(
                    f"{source}: the weights lack {name}, which {type(self.model).__name__} needs; "
                    f"{choices(name, weights.table)}."
                )
            if found.shape != parameter.shape:
                raise InputError(
                    f"{source}: {name} has shape {list(found.shape)}, expected {list(parameter.shape)} "
                    "from the base model's config."
                )
            found_all[name] = found
        if self.model.device.type == "meta":
            return {name: _empty(info) for name, info in found_all.items()}
        resident = {name: weights.read(name).to(served.device) for name, served in self._parameters.items()}
        finite = _gathered(torch.isfinite(tensor).all() for tensor in resident.values()).tolist()
        for name, good in zip(resident, finite, strict=True):
            if not good:
                raise InputError(f"{source}: {name} holds values that are not finite; nothing can be merged with them.")
        return resident

    def plan(self, recipe: Recipe) -> MergePlan:
        return make_plan(recipe, self._parameters)

    @torch.no_grad()
    def materialize(self, recipe: Recipe) -> str:
        """Makes a recipe's merge `candidate`, which lasts until the next one, and returns its fingerprint.

        Raises CandidateFailed where a weight is not finite.
        """
        plan = self.plan(recipe)
        _check_tokenizer(recipe)
        parameters, made = self._make(plan)
        bad = (~torch.isfinite(_extremes(made)).all(1)).nonzero().flatten().tolist() if made else []
        if bad:
            raise CandidateFailed(f"non-finite weights after the merge in {list(made)[bad[0]]}")
        return fingerprint(parameters)

    @torch.no_grad()
    def rehearse(self, recipe: Recipe) -> None:
        """Does all that a candidate makes the device do, without asking it for anything."""
        parameters, made = self._make(self.plan(recipe))
        if made:
            _extremes(made)
        checksums(parameters)

    def _make(self, plan: MergePlan) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
        """Makes a merge `candidate`. Returns its parameters, and those of them that had to be worked out."""
        if not self._in_place(plan):
            return self._make_view(plan)
        for tensor in plan.tensors:
            self._merge(plan, tensor, self._parameters[tensor.name])
        self._naming.settle(self.model, self._parameters)
        self.candidate = self.model
        return self._parameters, self._parameters

    def _in_place(self, plan: MergePlan) -> bool:
        """Whether the merge has the resident model's layers in their order."""
        return len(plan.layers) == layer_count(self._parameters) and plan.keeps_layers

    def _make_view(self, plan: MergePlan) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
        check_view(self._folder)
        made = {}
        templates = [next(iter(layer.values())) for layer in plan.layers]
        places = {tensor.name: self._parameters[_template(tensor.name, templates)].device for tensor in plan.tensors}
        for tensor in plan.tensors:
            source = self._sources[tensor.models[0]][tensor.sources[0]]
            if not _unchanged(plan, tensor):
                made[tensor.name] = torch.empty(source.shape, dtype=self._dtype, device=places[tensor.name])
                self._merge(plan, tensor, made[tensor.name])
        tensors = {
            tensor.name: made[tensor.name]
            if tensor.name in made
            else self._shared(tensor.models[0], tensor.sources[0], places[tensor.name])
            for tensor in plan.tensors
        }
        parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
        self.candidate = make_view(self.model, parameters, templates)
        return parameters, made

    def _merge(self, plan: MergePlan, tensor: TensorMerge, out: torch.Tensor) -> None:
        plan.method.merge_into(out, self._inputs(plan, tensor, out.device), self.compiled, self._room)

    def _shared(self, reference: str, name: str, device: torch.device) -> torch.Tensor:
        """A source's tensor itself; where it has another dtype or device, one copy for all candidates."""
        tensor = self._sources[reference][name]
        if (tensor.dtype, tensor.device) == (self._dtype, device):
            return tensor
        return self._converted.setdefault((reference, name, device), tensor.to(device, self._dtype))

    def _inputs(self, plan: MergePlan, tensor: TensorMerge, device: torch.device) -> Inputs:
        """On one device, where most of them are: only layers that change places may have sources elsewhere."""
        given = list(zip(tensor.models, tensor.sources, strict=True))
        base = (tensor.base, tensor.base_source) if tensor.base is not None else None
        return Inputs(
            base=self._sources[base[0]][base[1]].to(device) if base is not None else None,
            tensors=tuple(self._sources[model][name].to(device) for model, name in given),
            per_model=tensor.per_model,
            shared=tensor.shared,
            uniforms=lambda index: self._uniform(plan.seed, tensor, index, device),
            rescale=plan.rescale,
            once=partial(self._once, tensor.name, (device, base, *given)),
            drawn=tuple((plan.seed, position) for position in tensor.positions),
            planes=self._planes,
        )

    def _once(
        self, name: str, given: tuple[Hashable, ...], what: Hashable, models: tuple[int, ...], make: Callable[[], T]
    ) -> T:
        """given: the device, and the tensors that are merged into `name`, the base's first."""
        key = (name, what, given[0], *(given[index + 2] for index in models))
        if key not in self._known:
            self._known[key] = tree_map_only(torch.Tensor, _lasting, make())
        known: T = self._known[key]
        return known

    def _uniform(self, seed: int, tensor: TensorMerge, index: int, device: torch.device) -> torch.Tensor:
        position, name = tensor.positions[index], tensor.name

        def make() -> torch.Tensor:
            count = self._sources[tensor.models[index]][tensor.sources[index]].numel()
            return as_field(uniform_field(seed, position, name, count, device), self._planes)

        return self._once(name, (device,), ("uniforms", seed, position), (), make)


def _lasting(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of what is kept for all candidates, where it is large, in memory of its own: in malloc's it would stand
    between what candidates free, and leave holes there."""
    if tensor.nbytes < _LARGE or tensor.device.type not in ("cpu", "meta"):
        return tensor
    if tensor.is_meta:  # a rehearsal, which counts the copy
        return tensor.clone()
    mapped = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def _template(name: str, templates: Sequence[int]) -> str:
    """The resident model's parameter in whose place a view's is."""
    layer = layer_index(name)
    return name if layer is None else with_layer(name, templates[layer])


def _check_tokenizer(recipe: Recipe) -> None:
    """A model in memory has the base's tokens, like all of its sources."""
    base = [TokenizerSettings(source=source) for source in ("base", recipe.base_model) if source]
    if recipe.vocabulary is not None and recipe.vocabulary not in base:
        raise InputError(
            "the recipe builds a tokenizer, and a model in memory keeps the base's; "
            "write the checkpoint with `evomerge merge` and use that."
        )


def _unchanged(plan: MergePlan, tensor: TensorMerge) -> bool:
    return plan.method.name == "passthrough" and tensor.per_model[0]["scale"] == 1.0


def _extremes(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The least and the largest element of each tensor, shape (tensors, 2), which show whatever is not finite."""
    return _gathered(torch.stack(tensor.aminmax()).to(torch.float32) for tensor in tensors.values())


def fingerprint(parameters: Mapping[str, torch.Tensor]) -> str:
    """16 hexadecimal digits over all weights: a sum of per-tensor checksums, so independent of order and device."""
    return f"{sum(checksums(parameters).tolist()) % (1 << 64):016x}"


def checksums(parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The checksum of every tensor; int64, shape (tensors,)."""
    return _gathered(checksum(tensor, name) for name, tensor in parameters.items())


def _gathered(results: Iterable[torch.Tensor]) -> torch.Tensor:
    """Small results from all devices, stacked on the first one's."""
    each = list(results)
    return torch.stack([result.to(each[0].device) for result in each])


def _empty(info: TensorInfo) -> torch.Tensor:
    return torch.empty(info.shape, dtype=getattr(torch, FLOATS[info.dtype]), device="meta")
