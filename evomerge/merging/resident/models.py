"""ResidentModels: the sources in memory, and one model whose parameters every candidate overwrites.

Sources are loaded once. A candidate costs one pass over each tensor, in float32, rounded once into the model's dtype,
and never touches the disk. A candidate of other layers is a view, which shares the tensors that it leaves unchanged.
What candidates have in common (uniform fields, thresholds, scalar products) is made on first use and kept.
"""

import mmap
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from evomerge.devices import CopyStream, devices_of, is_accelerator, trim
from evomerge.errors import CandidateFailed, InputError, choices
from evomerge.layers import layer_count, layer_index, with_layer
from evomerge.merging.building import empty_model, load_config, load_model
from evomerge.merging.methods.base import Inputs, Kind, Latest, Statistic
from evomerge.merging.methods.drawn import Drawn, Field
from evomerge.merging.methods.kernels import as_field, checksum, fingerprint_of, uniform_field
from evomerge.merging.methods.parts import whole_of
from evomerge.merging.methods.passes import room_on
from evomerge.merging.methods.rows import row_count, row_slopes
from evomerge.merging.methods.slopes import Key, slopes, smooth_parameters
from evomerge.merging.naming import check_view, naming_of
from evomerge.merging.plan import MergePlan, TensorMerge, make_plan
from evomerge.merging.resident.gradients import Followed, followed
from evomerge.merging.resident.parallel import with_blocks
from evomerge.merging.resident.placement import place
from evomerge.merging.resident.quantized import int8_layers, quantize, restore
from evomerge.merging.resident.rows import Rows
from evomerge.merging.resident.sources import (
    Form,
    FromFactors,
    Kept,
    OffDevice,
    OnDevice,
    Reader,
    Rehearsed,
    Source,
    Where,
    finite,
)
from evomerge.merging.resident.view import make_view
from evomerge.merging.skeleton import ties, untied
from evomerge.merging.sources.models import Models
from evomerge.merging.sources.statistics import Find, Shelf, Stored
from evomerge.merging.sources.tensor_files import Piece, TensorInfo, dtype_of
from evomerge.merging.sources.weights import Weights, untied_head
from evomerge.merging.vocabulary import Vocabulary
from evomerge.recipe import Recipe, TokenizerSettings

T = TypeVar("T")
_SMALL = 1 << 20  # bytes up to which a table is kept even where fields are not
_LARGE = 1 << 16  # bytes from which on a tensor gets memory pages of its own, and after which memory is given back


class ResidentModels:
    """The models of a search on one device, or on several that share the work layer by layer.

    devices: where they are.
    compiled: whether large tensors are merged by compiled code.
    where: where the tensors of the models live.
    fields: whether what is kept for each element is made again for every candidate.
    model: the transformers model that candidates are written into.
    candidate: the last candidate; `model` itself, or a view.
    """

    def __init__(
        self,
        models: Models,
        device: str,
        dtype: str,
        compiled: bool = False,
        rehearsal: bool = False,
        count: int = 1,
        head_apart: bool = False,
        sources: Where = "device",
        fields: Kept = "kept",
        adapters: Form = "expanded",
        quantized: bool = False,
        statistics: Find | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """models: the models that recipes may name. Every merge has the base's config.
        device: where they are, such as `cpu`.
        dtype: the dtype of merges, such as `bfloat16`.
        compiled: whether large tensors are merged by compiled code.
        rehearsal: whether everything is made on the meta device, without data, but otherwise as on `device`.
        count: how many devices to use, the first ones of that kind.
        head_apart: whether the head is a tensor of its own even where all sources tie it to their embedding. Where one
            source does not tie it, the head is a tensor of its own in any case.
        sources: where the tensors of the models live.
        fields: whether what is kept for each element is made again for every candidate.
        adapters: what tensors that adapters change are kept as.
        quantized: whether the first candidates will be quantized, so that there never is room for a whole one.
        statistics: finds what was measured of the models.
        vocabulary: that of every merge, with as many rows as the base, where models have other ones.
        Raises InputError for models that cannot be loaded, or do not fit.
        """
        self.devices = devices_of(device, count)
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
        self._naming = naming_of(config, skeleton)
        if quantized:
            quantize(self.model, self._naming)
        self._form = adapters
        whole = models if adapters == "expanded" else {model.source.folder for model in models.values()}
        place(self.model, self.devices, 1 + len(whole) * (sources == "device"))
        self._find()
        self.where, self.fields = sources, fields
        shared = sources == "host" and not is_accelerator(torch.device(device))  # pages that a CPU reads where they lie
        self._off_device = sources != "device" and not (rehearsal and shared)
        self._streams: dict[torch.device, CopyStream] = {}
        self._vocabulary = vocabulary
        self._rows = Rows(vocabulary, weights, self._naming.vocabulary, self._held) if vocabulary else None
        self._plain: dict[tuple[TensorInfo, torch.device], Source] = {}
        good: dict[Source, torch.Tensor] = {}
        self._sources = {reference: self._resident(source, good) for reference, source in weights.items()}
        self._find_statistic = statistics or Shelf().finder(models)
        self._statistics: dict[tuple[Path, str], Source] = {}
        self._small: dict[tuple[Path, str, torch.device], torch.Tensor] = {}
        self._kept: dict[Hashable, Any] = {}
        self._converted: dict[tuple[str, str, torch.device], torch.Tensor] = {}
        self.candidate: Any = self.model
        self._plan: MergePlan | None = None
        self._pieces: Mapping[str, Piece] = self._naming.pieces  # of the candidate

    def _find(self) -> None:
        """Finds the tensors of the resident model, and which of them are quantized."""
        self._parameters = self._naming.weights(self.model)
        self._int8 = int8_layers(self.model, self._naming)

    def _hold(self, quantized: bool) -> None:
        """Gives the resident model room for quantized candidates or for whole ones, and frees the other's."""
        if quantized == bool(self._int8):
            return
        self._int8.clear()
        self._parameters = {}
        if quantized:
            quantize(self.model, self._naming)
        else:
            restore(self.model)
        self._find()

    def _resident(self, weights: Weights, good: dict[Source, torch.Tensor]) -> dict[str, Source]:
        """The tensors of a model by name.

        good: whether sources are finite, as far as they were looked at.
        """
        source, infos = weights.source, {}
        for name, parameter in self._parameters.items():
            info = weights.find(name)
            if info is None:
                raise InputError(
                    f"{source}: the weights lack {name}, which {type(self.model).__name__} needs; "
                    f"{choices(name, weights.table)}."
                )
            aligned = self._rows is not None and name in self._rows
            if info.shape[aligned:] != parameter.shape[aligned:]:
                raise InputError(
                    f"{source}: {name} has shape {list(info.shape)}, expected {list(parameter.shape)} "
                    "from the base model's config."
                )
            infos[name] = info
        moved = [name for name in infos if self._rows is not None and name in self._rows]  # made when they are merged
        devices = {name: served.device for name, served in self._parameters.items()}
        resident = {
            name: self._source(weights, name, info, devices[name]) for name, info in infos.items() if name not in moved
        }
        if self.model.device.type == "meta":
            return resident
        checks = [self._checked(held, devices[name], good) for name, held in resident.items()]
        checks += [finite(weights.read(name)) for name in moved]
        for name, is_finite in zip([*resident, *moved], _gathered(checks).tolist(), strict=True):
            if not is_finite:
                raise InputError(f"{source}: {name} holds values that are not finite; nothing can be merged with them.")
        return resident

    def _source(self, weights: Weights, name: str, info: TensorInfo, device: torch.device) -> Source:
        """A tensor of a model. Models that have it in common share it."""
        changes = weights.products(name) if self._form == "factors" else ()
        if weights.changes(name) and not changes:
            return self._held(weights, name, _empty(info), device)
        start = weights.plain.find(name) or info
        if (start, device) not in self._plain:
            self._plain[start, device] = self._held(weights.plain, name, _empty(start), device)
        plain = self._plain[start, device]
        read = _empty if device.type == "meta" else weights.read_stored
        factors = [change.factors(read) for change in changes]
        return FromFactors(plain, dtype_of(start), factors, device) if factors else plain

    def _held(self, weights: Reader, name: str, like: torch.Tensor, device: torch.device) -> Source:
        """A tensor where sources live.

        like: a tensor of its shape and dtype on the meta device, which stands for it in a rehearsal.
        """
        if device.type == "meta":
            return (Rehearsed if self._off_device else OnDevice)(like)
        if not self._off_device:
            return OnDevice(weights.read(name, device))
        return OffDevice(weights, name, like.shape, self._streams, leaves=self.where == "disk")

    def _checked(self, source: Source, device: torch.device, good: dict[Source, torch.Tensor]) -> torch.Tensor:
        """Whether a source is finite. What is off the device is checked where it lies."""
        if isinstance(source, FromFactors) and source.stays_finite():
            source = source.start
        if source not in good:
            good[source] = finite(source.on(torch.device("cpu") if self._off_device else device))
            source.release()
        return good[source]

    def _source_of(self, tensor: TensorMerge, index: int, device: torch.device) -> Source:
        """One model's tensor in the rows of the merge.

        index: the model's place in `tensor.models`; -1 is the base.
        """
        if self._rows is not None and tensor.name in self._rows:
            return self._rows.source(tensor, index, device)
        model, name = tensor.source(index)
        return self._sources[model][name]

    def _check_tokenizer(self, recipe: Recipe) -> None:
        """Raises InputError where a recipe builds a tokenizer: a model in memory has the base's tokens."""
        wanted, base = recipe.vocabulary, [source for source in ("base", recipe.base_model) if source]
        if wanted is None or wanted in [TokenizerSettings(source=source) for source in base]:
            return
        if self._vocabulary is None or wanted != self._vocabulary.wanted:
            raise InputError(
                "the recipe builds a tokenizer, and a model in memory keeps the base's; "
                "write the checkpoint with `evomerge merge` and use that."
            )

    def plan(self, recipe: Recipe) -> MergePlan:
        """The plan of a recipe for these models. Raises InputError for what cannot be merged."""
        return make_plan(recipe, self._parameters)

    @torch.no_grad()
    def materialize(self, recipe: Recipe, quantized: bool = False) -> str:
        """The fingerprint of a recipe's merge, which becomes `candidate` until the next one is made.

        recipe: the candidate's.
        quantized: whether `candidate` is quantized. The fingerprint is that of the merge before it is quantized.
            Layers that run side by side have a part in it (`with_blocks`).
        Raises CandidateFailed where a weight is not finite, and InputError for what cannot be merged.
        """
        plan = self.plan(recipe)
        self._check_tokenizer(recipe)
        self._hold(quantized)
        if quantized:
            sums, extremes = self._make_quantized(plan)
            names = [tensor.name for tensor in plan.tensors]
        else:
            parameters, made = self._make(plan)
            extremes, names = least_and_largest(made) if made else torch.zeros(0, 2), list(made)
        bad = (~torch.isfinite(extremes).all(1)).nonzero().flatten().tolist()
        if bad:
            raise CandidateFailed(f"non-finite weights after the merge in {names[bad[0]]}")
        return with_blocks(fingerprint_of(sums.tolist()) if quantized else fingerprint(parameters), plan.parallel)

    @torch.no_grad()
    def rehearse(self, recipe: Recipe) -> None:
        """Does everything that a candidate makes the device do, but reads no result back."""
        if self._int8:
            self._make_quantized(self.plan(recipe))
            return
        parameters, made = self._make(self.plan(recipe))
        if made:
            least_and_largest(made)
        checksums(parameters)

    @torch.no_grad()
    def put(self, reference: str, names: Iterable[str]) -> None:
        """Writes tensors of a model into the resident model.

        reference: the model's.
        names: of the tensors.
        """
        for name in names:
            source = self._sources[reference][name]
            self._parameters[name].copy_(whole_of(source.on(self._parameters[name].device)))
            source.release()
        self._naming.settle(self.model, self._parameters)

    @torch.no_grad()
    def merge_some(self, plan: MergePlan, tensors: Iterable[TensorMerge], statistics: Find | None = None) -> None:
        """Merges some tensors into the resident model.

        plan: the merge, which keeps layers in their places.
        tensors: those of its tensors that are merged.
        statistics: finds what was measured of the models; by default as for candidates.
        """
        with self._finding(statistics):
            for tensor in tensors:
                self._merge(plan, tensor, self._parameters[tensor.name])
        self._naming.settle(self.model, self._parameters)

    @torch.no_grad()
    def make_with(self, plan: MergePlan, statistics: Find) -> None:
        """Makes a merge, which becomes `candidate`. Whether its weights are finite is not checked.

        plan: the merge, which keeps layers in their places.
        statistics: finds what was measured of the models.
        """
        with self._finding(statistics):
            self._make(plan)

    @contextmanager
    def _finding(self, statistics: Find | None) -> Iterator[None]:
        """A context in which statistics are found in another way; None for the usual way."""
        usual, self._find_statistic = self._find_statistic, statistics or self._find_statistic
        try:
            yield
        finally:
            self._find_statistic = usual

    def shape_of(self, tensor: TensorMerge) -> torch.Size:
        """The shape of a merged tensor."""
        return self._source_of(tensor, 0, self._parameters[tensor.name].device).shape

    def _make(self, plan: MergePlan) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
        """Makes a merge and sets `candidate` to it. Returns its parameters, and those that had to be computed."""
        self._plan = plan
        if not self._in_place(plan):
            return self._make_view(plan)
        self._pieces = self._naming.pieces
        for tensor in plan.tensors:
            self._merge(plan, tensor, self._parameters[tensor.name])
        self._naming.settle(self.model, self._parameters)
        self.candidate = self.model
        return self._parameters, self._parameters

    def _make_quantized(self, plan: MergePlan) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes a quantized merge, which has one tensor at a time before it is quantized, and sets `candidate` to it.
        Returns the checksums and extremes of the tensors as they were before."""
        assert self._in_place(plan)  # as preparation refuses spaces that change layers
        sums, extremes = [], []
        for tensor in plan.tensors:
            layer = self._int8.get(tensor.name)
            out = self._parameters[tensor.name] if layer is None else layer.empty()
            self._merge(plan, tensor, out)
            sums.append(checksum(out, tensor.name))
            extremes.append(torch.stack(out.aminmax()).to(torch.float32))
            if layer is not None:
                layer.take(out)
        self._naming.settle(self.model, self._parameters)
        self._plan, self.candidate, self._pieces = plan, self.model, self._naming.pieces
        return _gathered(sums), _gathered(extremes)

    def following(self, wanted: Sequence[str]) -> AbstractContextManager[Followed]:
        """A context that sums up the derivatives of losses by parameters of the last candidate's merge, while backward
        passes go through it.

        wanted: the names of the parameters, such as `weight`.
        """
        assert self._plan is not None
        plan = self._plan
        merges = [merge for merge in plan.tensors if smooth_parameters(plan.method, merge.shared, wanted)]

        def slopes_of(merge: TensorMerge, gradient: torch.Tensor) -> Mapping[Key, torch.Tensor]:
            return self._slopes_of(plan, merge, gradient, wanted)

        return followed(self.candidate, self._naming, self._pieces, merges, slopes_of)

    def following_rows(self) -> AbstractContextManager[Followed]:
        """The same by the weights of rows, which become vectors under the name `weight` (`methods.rows`)."""
        assert self._plan is not None
        plan = self._plan

        def slopes_of(merge: TensorMerge, gradient: torch.Tensor) -> Mapping[Key, torch.Tensor]:
            return row_slopes(self._inputs(plan, merge, gradient.device), gradient)

        return followed(self.candidate, self._naming, self._pieces, plan.tensors, slopes_of)

    def _slopes_of(
        self, plan: MergePlan, merge: TensorMerge, gradient: torch.Tensor, wanted: Sequence[str]
    ) -> Mapping[Key, torch.Tensor]:
        return slopes(plan.method, self._inputs(plan, merge, gradient.device), gradient, wanted)

    def _in_place(self, plan: MergePlan) -> bool:
        """Whether the merge has the resident model's layers in their order, one after the other."""
        return not plan.parallel and len(plan.layers) == layer_count(self._parameters) and plan.keeps_layers

    def _make_view(self, plan: MergePlan) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
        check_view(self._folder)
        made = {}
        templates = [next(iter(layer.values())) for layer in plan.layers]
        places = {tensor.name: self._parameters[_template(tensor.name, templates)].device for tensor in plan.tensors}
        for tensor in plan.tensors:
            if not _unchanged(plan, tensor):
                shape = self._source_of(tensor, 0, places[tensor.name]).shape
                made[tensor.name] = torch.empty(shape, dtype=self._dtype, device=places[tensor.name])
                self._merge(plan, tensor, made[tensor.name])
        shared: dict[Hashable, torch.Tensor] = {}  # by layers that stand in several places
        tensors = {}
        for tensor in plan.tensors:
            key = (*tensor.source(0), places[tensor.name])
            if tensor.name not in made and key not in shared:
                shared[key] = self._shared(tensor, places[tensor.name])
            tensors[tensor.name] = made[tensor.name] if tensor.name in made else shared[key]
        parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
        self._pieces = {name: _moved(self._naming.pieces[_template(name, templates)], name) for name in parameters}
        held = {self._pieces[name].tensor: parameter for name, parameter in parameters.items()}
        self.candidate = make_view(self.model, held, templates, plan.parallel)
        return parameters, made

    def _merge(self, plan: MergePlan, tensor: TensorMerge, out: torch.Tensor) -> None:
        plan.method.merge_into(out, self._inputs(plan, tensor, out.device), self.compiled, self._room)
        for index in tensor.places:
            self._source_of(tensor, index, out.device).release()
        if self.where == "disk" and out.nbytes >= _LARGE:
            trim()

    def _shared(self, tensor: TensorMerge, device: torch.device) -> torch.Tensor:
        """The only source of a tensor. Where it has to change its dtype or device, one copy serves all candidates."""
        source = self._source_of(tensor, 0, device)
        whole = whole_of(source.on(device))
        if self._off_device or isinstance(source, FromFactors):  # copies for all candidates would be all sources
            return whole.to(device, self._dtype)
        if (whole.dtype, whole.device) == (self._dtype, device):
            return whole
        return self._converted.setdefault((*tensor.source(0), device), whole.to(device, self._dtype))

    def _inputs(self, plan: MergePlan, tensor: TensorMerge, device: torch.device) -> Inputs:
        """A tensor's inputs, all on one device. Only layers that change places may have sources on another one."""
        elements = {index: self._source_of(tensor, index, device).on(device) for index in tensor.places}
        return Inputs(
            base=elements.get(-1),
            tensors=tuple(elements[index] for index in range(len(tensor.models))),
            per_model=tensor.per_model,
            shared=tensor.shared,
            uniforms=lambda index: self._uniform(plan.seed, tensor, index, device),
            rescale=plan.rescale,
            once=partial(self._once, tensor.name, self._given(tensor, device)),
            drawn=tuple((plan.seed, position) for position in tensor.positions),
            planes=self._planes,
            in_layer=layer_index(tensor.name) is not None,
            statistic=partial(self._statistic, tensor, device),
        )

    def _statistic(self, tensor: TensorMerge, device: torch.device, kind: Kind, index: int) -> Statistic | None:
        """A statistic of a tensor of a model. Fisher information lives where sources do; all else is read when it is
        asked for. Rows of tokens that are put in another order have none."""
        if self._rows is not None and tensor.name in self._rows:
            return None
        model, name = tensor.source(index)
        if self.model.device.type == "meta":
            return self._rehearsed(self._sources[model][name].shape, kind, layer_index(name) is not None)
        stored = self._find_statistic(kind, model)
        own = stored.tensor_of(name)
        if own is None:
            return None
        if kind not in ("fisher", "row_weights") or not isinstance(stored, Stored):
            return Statistic(stored.read(own), stored.mean, stored.transposed(name))
        key = stored.folder, own
        if kind == "row_weights":  # small, and read for every candidate
            if (*key, device) not in self._small:
                self._small[*key, device] = stored.read(own).to(device)
            return Statistic(self._small[*key, device])
        if key not in self._statistics:
            self._statistics[key] = self._held(stored.weights, own, _empty(stored.weights.table[own]), device)
        return Statistic(self._statistics[key].on(device), stored.mean)

    def _rehearsed(self, shape: torch.Size, kind: Kind, in_layer: bool) -> Statistic | None:
        if kind == "fisher":
            held = Rehearsed if self._off_device else OnDevice
            return Statistic(held(torch.empty(shape, device="meta")).on(torch.device("meta")))
        if kind == "row_weights":
            return Statistic(torch.empty(row_count(shape, in_layer), device="meta"))
        if len(shape) != 2:
            return None
        return Statistic(torch.empty(shape[-1:] if kind == "activations" else shape[-1:] * 2, device="meta"))

    def _given(self, tensor: TensorMerge, device: torch.device) -> tuple[Hashable, ...]:
        """What results that are kept depend on: the device, then the tensors that are merged, the base's first."""
        moved = self._rows if self._rows is not None and tensor.name in self._rows else None

        def decides(index: int) -> Hashable:
            own = tensor.source(index)
            return own if moved is None else (own, moved.given(tensor, index))

        base = decides(-1) if tensor.base is not None else None
        return (device, base, *map(decides, range(len(tensor.models))))

    def _once(
        self, name: str, given: tuple[Hashable, ...], what: Hashable, models: tuple[int, ...], make: Callable[[], T]
    ) -> T:
        """A `base.Once` for the output tensor `name`.

        given: see `_given`; the device alone where no tensor counts.
        """
        value = what.value if isinstance(what, Latest) else None
        key = key_of_kept(name, given, what, models)
        if key not in self._kept or self._kept[key][0] != value:
            self._kept.pop(key, None)  # before the next is made
            made = make()
            if self.fields == "made" and bytes_of(made) > _SMALL:
                return made
            self._kept[key] = value, tree_map_only(torch.Tensor, _lasting, made)
        kept: T = self._kept[key][1]
        return kept

    def _uniform(self, seed: int, tensor: TensorMerge, index: int, device: torch.device) -> Field:
        position, name = tensor.positions[index], tensor.name
        if self.fields == "made":
            return Drawn(seed, position, name)

        def make() -> torch.Tensor:
            count = self._source_of(tensor, index, device).shape.numel()
            return as_field(uniform_field(seed, position, name, count, device), self._planes)

        return self._once(name, (device,), ("uniforms", seed, position), (), make)


def key_of_kept(name: str, given: tuple[Hashable, ...], what: Hashable, models: tuple[int, ...]) -> Hashable:
    """The key under which a result is kept (see `ResidentModels._once`)."""
    what = what.what if isinstance(what, Latest) else what
    return (name, what, given[0], *(given[index + 2] for index in models))


def bytes_of(made: Any) -> int:
    """The bytes of all tensors in a result."""
    return sum(leaf.nbytes for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor))


def _lasting(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is kept for all candidates; a large one is copied into memory pages of its own. In malloc's memory
    it would lie between blocks that candidates free, and leave holes there."""
    if tensor.nbytes < _LARGE or tensor.device.type not in ("cpu", "meta"):
        return tensor
    if tensor.is_meta:  # a rehearsal, which counts the copy
        return tensor.clone()
    mapped = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def _template(name: str, templates: Sequence[int]) -> str:
    """The name of the resident model's parameter that a view's parameter takes the place of."""
    layer = layer_index(name)
    return name if layer is None else with_layer(name, templates[layer])


def _moved(piece: Piece, name: str) -> Piece:
    """The piece of the resident model that a tensor takes the place of, in the layer that the tensor belongs to.

    piece: in the resident model, a whole tensor.
    name: of the tensor in a checkpoint.
    """
    layer = layer_index(name)
    return piece if layer is None else replace(piece, tensor=with_layer(piece.tensor, layer))


def _unchanged(plan: MergePlan, tensor: TensorMerge) -> bool:
    return plan.method.name == "passthrough" and tensor.per_model[0]["scale"] == 1.0


def least_and_largest(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The least and the largest element of each tensor, shape (tensors, 2); one is not finite where any element is
    not."""
    return _gathered(torch.stack(tensor.aminmax()).to(torch.float32) for tensor in tensors.values())


def fingerprint(parameters: Mapping[str, torch.Tensor]) -> str:
    """The fingerprint of weights, 16 hexadecimal digits: the sum of the tensors' checksums, the same in any order and
    on any device."""
    return fingerprint_of(checksums(parameters).tolist())


def checksums(parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The checksum of each tensor; int64, shape (tensors,)."""
    return _gathered(checksum(tensor, name) for name, tensor in parameters.items())


def _gathered(results: Iterable[torch.Tensor]) -> torch.Tensor:
    """Small results from all devices, stacked on the first result's device."""
    scalars = list(results)
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars])


def _empty(info: TensorInfo) -> torch.Tensor:
    return torch.empty(info.shape, dtype=dtype_of(info), device="meta")
