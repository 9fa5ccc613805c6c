"""ResidentModels: the sources in memory, and one model into whose parameters every candidate is written in place.

Sources are loaded once; a candidate costs one pass over each tensor, in float32, rounded once into the model's dtype,
and never touches the disk. What candidates have in common (uniform fields, thresholds, scalar products) is made on
first use and kept.
"""

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from evomerge.errors import CandidateFailed, InputError, choices
from evomerge.layers import layer_count
from evomerge.merging.kernels import as_field, checksum, uniform_field
from evomerge.merging.methods.base import Inputs
from evomerge.merging.passes import chunk_size
from evomerge.merging.plan import MergePlan, TensorMerge, make_plan
from evomerge.merging.skeleton import empty_model, load_config
from evomerge.merging.sources import FLOATS, ModelSource, TensorInfo, Weights, named_weights
from evomerge.quiet import quiet
from evomerge.recipe import Recipe, TokenizerSettings

T = TypeVar("T")


class ResidentModels:
    """The models of a search on one device."""

    def __init__(
        self,
        sources: Mapping[str, ModelSource | Path],
        skeleton: Path,
        device: str,
        dtype: str,
        compiled: bool = False,
        rehearsal: bool = False,
    ) -> None:
        """sources: every model reference with its source. skeleton: the folder whose config the merge takes. compiled:
        whether large tensors are merged by compiled code. rehearsal: everything is made on the meta device, without any
        data, as it would be on `device`."""
        self.device = torch.device("meta" if rehearsal else device)
        self.compiled = compiled and not rehearsal
        self._planes = compiled and torch.device(device).type == "cpu"
        self._chunk = chunk_size(torch.device(device))
        self.model: Any = (
            empty_model(load_config(skeleton), skeleton).to(getattr(torch, dtype))
            if rehearsal
            else load_model(skeleton, getattr(torch, dtype)).to(self.device)
        )
        self._parameters = named_weights(self.model)
        self._sources = {reference: self._resident(source) for reference, source in sources.items()}
        self._known: dict[Hashable, Any] = {}

    def _resident(self, source: ModelSource | Path) -> dict[str, torch.Tensor]:
        weights = Weights(source)
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
        if self.device.type == "meta":
            stored = {name: weights.table[name] for name in self._parameters}
            return {name: _empty(info) for name, info in stored.items()}
        resident = {name: weights.read(name).to(self.device) for name in self._parameters}
        finite = torch.stack([torch.isfinite(tensor).all() for tensor in resident.values()]).tolist()
        for name, good in zip(resident, finite, strict=True):
            if not good:
                raise InputError(f"{source}: {name} holds values that are not finite; nothing can be merged with them.")
        return resident

    def plan(self, recipe: Recipe) -> MergePlan:
        return make_plan(recipe, self._parameters)

    @torch.no_grad()
    def materialize(self, recipe: Recipe) -> str:
        """Writes a recipe's merge into the resident model and returns its fingerprint.

        Raises CandidateFailed where a weight is not finite.
        """
        plan = self.plan(recipe)
        _check_tokenizer(recipe)
        self._check_structure(plan)
        extremes = self._write(plan)
        bad = (~torch.isfinite(extremes).all(1)).nonzero().flatten().tolist()
        if bad:
            raise CandidateFailed(f"non-finite weights after the merge in {plan.tensors[bad[0]].name}")
        return fingerprint(self._parameters)

    @torch.no_grad()
    def rehearse(self, recipe: Recipe) -> None:
        """Does all that a candidate makes the device do, without asking it for anything."""
        self._write(self.plan(recipe))
        checksums(self._parameters)

    def _write(self, plan: MergePlan) -> torch.Tensor:
        """Writes a merge; returns the least and the largest element of each tensor, shape (tensors, 2), which show
        whatever is not finite."""
        extremes = []
        for tensor in plan.tensors:
            parameter = self._parameters[tensor.name]
            plan.method.merge_into(parameter, self._inputs(plan, tensor), self.compiled, self._chunk)
            extremes.append(torch.stack(parameter.aminmax()).to(torch.float32))
        return torch.stack(extremes)

    def _check_structure(self, plan: MergePlan) -> None:
        """The resident model has the skeleton's layers, and its config says things about each of them."""
        if len(plan.layers) != layer_count(self._parameters) or not plan.keeps_layers:
            raise InputError(
                "the recipe repeats, drops or reorders layers, and a model in memory keeps its own; "
                "write the checkpoint with `evomerge merge` and use that."
            )

    def _inputs(self, plan: MergePlan, tensor: TensorMerge) -> Inputs:
        given = list(zip(tensor.models, tensor.sources, strict=True))
        base = (tensor.base, tensor.base_source) if tensor.base is not None else None
        return Inputs(
            base=self._sources[base[0]][base[1]] if base is not None else None,
            tensors=tuple(self._sources[model][name] for model, name in given),
            per_model=tensor.per_model,
            shared=tensor.shared,
            uniforms=lambda index: self._uniform(plan.seed, tensor.positions[index], tensor.name),
            rescale=plan.rescale,
            once=partial(self._once, tensor.name, (base, *given)),
            drawn=tuple((plan.seed, position) for position in tensor.positions),
            planes=self._planes,
        )

    def _once(
        self, name: str, given: tuple[Hashable, ...], what: Hashable, models: tuple[int, ...], make: Callable[[], T]
    ) -> T:
        """given: the tensors that are merged into `name`, the base's first."""
        key = (name, what, *(given[index + 1] for index in models))
        if key not in self._known:
            self._known[key] = make()
        known: T = self._known[key]
        return known

    def _uniform(self, seed: int, position: int, name: str) -> torch.Tensor:
        def make() -> torch.Tensor:
            count = self._parameters[name].numel()
            return as_field(uniform_field(seed, position, name, count, self.device), self._planes)

        return self._once(name, (), ("uniforms", seed, position), (), make)


def _check_tokenizer(recipe: Recipe) -> None:
    """A model in memory has the base's tokens, like all of its sources."""
    base = [TokenizerSettings(source=source) for source in ("base", recipe.base_model) if source]
    if recipe.vocabulary is not None and recipe.vocabulary not in base:
        raise InputError(
            "the recipe builds a tokenizer, and a model in memory keeps the base's; "
            "write the checkpoint with `evomerge merge` and use that."
        )


def fingerprint(parameters: Mapping[str, torch.Tensor]) -> str:
    """16 hexadecimal digits over all weights: a sum of per-tensor checksums, so independent of order and device."""
    return f"{sum(checksums(parameters).tolist()) % (1 << 64):016x}"


def checksums(parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The checksum of every tensor; int64, shape (tensors,)."""
    return torch.stack([checksum(tensor, name) for name, tensor in parameters.items()])


def _empty(info: TensorInfo) -> torch.Tensor:
    return torch.empty(info.shape, dtype=getattr(torch, FLOATS[info.dtype]), device="meta")


def load_model(folder: Path, dtype: torch.dtype) -> nn.Module:
    """A causal language model from safetensors, without code from its folder."""
    try:
        with quiet():
            from transformers import AutoModelForCausalLM

            model: Any = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # a config is checked by several libraries, each with its own exceptions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
        raise InputError(f"{folder}: transformers cannot load this model ({reason}); check its config.json.") from None
    model.eval()
    return model  # type: ignore[no-any-return]
