"""Memory: how much a worker needs, measured by rehearsing its work on PyTorch's meta device, where tensors have no
data.
"""

import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evomerge.config.search import SearchConfig
from evomerge.devices import device_count, free_memory, is_accelerator, resolve_device
from evomerge.evaluation.harness import Tokens
from evomerge.evaluation.loading import Target, load_targets
from evomerge.merging import methods
from evomerge.merging.methods.parts import STAGED
from evomerge.merging.naming import naming_in
from evomerge.merging.resident.rehearsal import RehearsedModels, Traffic
from evomerge.merging.resident.sources import Form, Kept, Where
from evomerge.merging.sources.models import Model, Models, models_of
from evomerge.merging.sources.tensor_files import dtype_of, parameter_count
from evomerge.recipe import Recipe
from evomerge.spaces import SearchSpace, at
from evomerge.spaces.make import make_space
from evomerge.workers.worker import Worker, rehearsed_models, workers_of_a_node

_QUESTIONS = tuple(getattr(torch.ops.aten, name).default for name in ("item", "is_nonzero", "_local_scalar_dense"))
_LIBRARIES = 540 << 20  # of a process that has imported torch, transformers and lm-eval
_COMPILER = 100 << 20  # more, once it has compiled something
# glibc's allocator keeps memory that candidates have freed (it returns only large pieces at once): this many times what
# a candidate takes, up to a limit; measured on models of 135 million parameters.
_KEPT_OF_CANDIDATES, _MOST_KEPT_OF_CANDIDATES = 2.0, 192 << 20
_ENGINE_LIBRARIES = 1640 << 20  # of a process with an engine, apart from weights and cache
_STAGING = 4 * STAGED  # bytes of locked memory, in which two pieces wait for their copies
_SPARE = 0.9  # the share of free memory that is given away
_PLENTY, _WORKING = 3, 2 << 30  # of models and of batches: what the first placement takes at most, unless it is planned
_FIELDS: tuple[Kept, ...] = ("kept", "made")


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that counts the bytes of the tensors made in it, as long as they live.

    now: bytes of the tensors that live now.
    peak: the most bytes that lived at once.
    """

    def __init__(self, says_yes: bool = False) -> None:
        """says_yes: whether code that asks for a truth value of a tensor without data gets True. Else the question
        raises.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._says_yes = says_yes
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._says_yes and func in _QUESTIONS:
            return True
        made = func(*args, **(kwargs or {}))
        for leaf in (made,) if isinstance(made, torch.Tensor) else tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return made

    def more(self, work: Callable[[], object]) -> int:
        """The most bytes that live at once during some work, beyond those that live before. `peak` starts anew."""
        self.peak = before = self.now
        work()
        return self.peak - before

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory that one worker needs, in bytes.

    models: for the models, and the model that candidates are written into.
    shared: for what all candidates share (fields, tables).
    candidate: for what a candidate takes beyond that, while it is merged and scored.
    libraries: for Python with its libraries and its allocator; 0 where the device is a GPU.
    engine: for vLLM, where it writes the texts: weights and cache, and on the host the shared memory and its libraries.
    """

    models: int
    shared: int
    candidate: int
    libraries: int
    engine: int = 0

    @property
    def total(self) -> int:
        """The sum of all fields."""
        return self.models + self.shared + self.candidate + self.libraries + self.engine

    def parts(self) -> dict[str, int]:
        """All fields by name, and `total`."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True, slots=True)
class Placement:
    """A way to place the models of a search, and what it takes. It changes no bit of a merge.

    sources: where the sources live.
    fields: whether what is kept for each element is kept for all candidates, or made again.
    adapters: what tensors that adapters change are kept as.
    worker: what one worker needs on its device; on a CPU, in its process, with sources that workers share.
    host: bytes of a node's memory, for all of its workers.
    disk: bytes that each candidate reads from the disk anew.
    copied: bytes that each candidate copies from the host to the device.
    moved: bytes that the merge of each candidate reads and writes where it is made.
    lacking: says what this machine has too little of; None where it has enough, or where nobody can say.
    chosen: whether the search takes it. None of them is where the search leaves it to a device that is not here.
    """

    sources: Where
    fields: Kept
    adapters: Form
    worker: MemoryPlan
    host: int
    disk: int
    copied: int
    moved: int
    lacking: str | None = None
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """What a search takes.

    placements: the fastest first.
    tokens: what a candidate has to read and to write, to be scored on all search items.
    """

    placements: tuple[Placement, ...]
    tokens: Tokens

    @property
    def chosen(self) -> Placement:
        """The placement that the search takes; where nobody can say, the one that takes the most memory."""
        return next((placement for placement in self.placements if placement.chosen), self.placements[0])


def plan_memory(
    config: SearchConfig, space: SearchSpace, models: Models | None = None, targets: Mapping[str, Target] | None = None
) -> MemoryPlan:
    """The memory that a worker of a search needs in the placement that the search takes (see `plan_placements`)."""
    return plan_placements(config, space, models, targets).chosen.worker


def plan_placements(
    config: SearchConfig, space: SearchSpace, models: Models | None = None, targets: Mapping[str, Target] | None = None
) -> SearchPlan:
    """What a search takes in each placement of its models, measured by rehearsing the middle of the space with every
    method.

    config: the search's, resolved.
    space: the search's.
    models: the config's models, where their headers are read already; by default they are read here.
    targets: the config's tasks, where they are loaded already; by default they are loaded here.
    """
    models, recipes = models or models_of(config), list(_typical(space))
    device = torch.device(config.evaluation.device)
    least: tuple[Where, Kept, Form] = ("disk", "made", "expanded")
    scoring, merged = _rehearse_scoring(_placed(config, *least), recipes, models, targets)
    near: Where = "device" if is_accelerator(device) else "host"
    places: tuple[Where, ...] = ("device", "host", "disk") if near == "device" else ("host", "disk")
    forms = _forms(config, models)
    by_token = _bytes_of_rows(models) if config.space.tokenizer_source is not None else 0
    rows = [
        (where, fields, form)
        for where in places
        for form in (forms if where == near else forms[-1:])  # where pieces are copied, factors are fewer bytes
        for fields in _FIELDS
    ]
    rehearsed = dict.fromkeys((near if where == near else "disk", fields, form) for where, fields, form in rows)
    rehearsed |= dict.fromkeys(("disk", "made", form) for form in forms)
    merging = {least: merged} | {
        row: _rehearse_merging(_placed(config, *row), recipes, models, scoring.wanted)
        for row in rehearsed
        if row != least
    }
    sources = {form: merging[near, "made", form].held - merging["disk", "made", form].held for form in forms}
    placements = [
        _placement(config, row, merging[like, row[1], row[2]], scoring, sources[row[2]], by_token, models)
        for row, like in ((row, near if row[0] == near else "disk") for row in rows)
    ]
    return SearchPlan(tuple(with_choice(config, placements)), scoring.tokens)


def make_worker(
    config: SearchConfig, models: Models | None = None, targets: Mapping[str, Target] | None = None, **given: Any
) -> Worker:
    """A worker whose sources live where the plan says for the machine that it is on.

    Models that are small beside the memory need no plan: the first placement fits in any case.

    config: the search's, resolved.
    models, targets: as for a `Worker`.
    given: what else a `Worker` takes.
    """
    models = models or models_of(config)
    if not _roomy(config, models):
        targets = targets or load_targets(config.reported, config.tasks, config.evaluation)
        placed = plan_placements(unquantized(config), make_space(config, models), models, targets).chosen
        config = _placed(config, placed.sources, placed.fields, placed.adapters)
    return Worker(config, models, targets, **given)


def unquantized(config: SearchConfig) -> SearchConfig:
    """The config of a search whose candidates are never quantized."""
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"quantize": None})})


def _roomy(config: SearchConfig, models: Models) -> bool:
    """Whether nothing is left to the plan, or this machine has many times the memory that the models take."""
    evaluation = config.evaluation
    if "auto" not in (evaluation.sources, evaluation.fields, evaluation.adapters):
        return True
    elements = sum(parameter_count(model.table) for model in models.values())
    device, count = torch.device(resolve_device(evaluation.device)), workers_of_a_node(config)
    wanted = _PLENTY * 6 * elements + _WORKING  # in float32, with a field of 16 bits
    on_device = not is_accelerator(device) or wanted <= _SPARE * free_memory(device)
    return on_device and count * wanted <= _SPARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True, slots=True)
class _Scoring:
    """What scoring takes, in bytes.

    batches: of the prepared tasks.
    weights: of the model.
    peaks: beyond what is there before, for each recipe.
    slopes: of the derivatives of a merge, for each recipe; they are part of `peaks`.
    wanted: the parameters by which derivatives are taken, for each recipe.
    tokens: what a candidate reads and writes.
    """

    batches: int
    weights: int
    peaks: tuple[int, ...]
    slopes: tuple[int, ...]
    wanted: tuple[tuple[str, ...], ...]
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class _Merging:
    """What merging takes, in bytes.

    held: the models, and the model that candidates are written into.
    shared: what all candidates share.
    peak: of all merges, beyond both.
    slopes: of the derivatives of each recipe's merge.
    traffic: what the last candidate moved.
    """

    held: int
    shared: int
    peak: int
    slopes: tuple[int, ...]
    traffic: Traffic


def _placement(
    config: SearchConfig,
    row: tuple[Where, Kept, Form],
    merging: "_Merging",
    scoring: "_Scoring",
    sources: int,
    by_token: int,
    models: Models,
) -> Placement:
    """What a placement takes.

    row: where sources live, whether fields are kept, and what adapters are kept as.
    sources: the bytes of all sources that are the same in every worker.
    by_token: the bytes of the sources whose rows each worker puts in another order.
    """
    where, fields, form = row
    on_host = not is_accelerator(torch.device(config.evaluation.device))
    candidate = _candidate(merging, scoring)
    process = _LIBRARIES + _COMPILER * (config.evaluation.compile is True)
    if on_host:
        process += int(min(_KEPT_OF_CANDIDATES * candidate, _MOST_KEPT_OF_CANDIDATES))
    engine, beside = _engine(config, scoring.weights, on_host)
    plan = MemoryPlan(merging.held + scoring.batches, merging.shared, candidate, process if on_host else 0, engine)
    private = sum(_private_bytes(model, form) for model in models.values())
    mapped = sources - private if where == "host" else 0
    if on_host:
        own = plan.total - mapped
    else:
        own = process + beside + (_STAGING if where != "device" else 0) + (private + by_token if where == "host" else 0)
    return Placement(
        where,
        fields,
        form,
        plan,
        host=mapped + workers_of_a_node(config) * own,
        disk=merging.traffic.sources if where == "disk" else 0,
        copied=0 if on_host or where == "device" else merging.traffic.sources,
        moved=merging.traffic.total,
    )


def _candidate(merging: _Merging, scoring: _Scoring) -> int:
    """What a candidate takes while it is merged and scored. The derivatives of a merge take more where more has to be
    made again."""
    rows = zip(scoring.peaks, merging.slopes, scoring.slopes, strict=True)
    return max(merging.peak, *(peak + max(0, here - there) for peak, here, there in rows))


def _rehearse_scoring(
    config: SearchConfig, recipes: Sequence[Recipe], models: Models, targets: Mapping[str, Target] | None
) -> tuple[_Scoring, _Merging]:
    """What scoring takes, and what merging takes where models live as the config says."""
    with LiveBytes(says_yes=True) as live:  # transformers asks whether a batch is free of padding
        resident = rehearsed_models(config, models)
        held = live.now
        worker = Worker(config, models, targets, rehearsal=resident)
        batches = live.now - held
        learns = config.optimizer.follows_gradients
        wanted = tuple(methods.get(recipe.merge_method, "merge_method").slopes if learns else () for recipe in recipes)
        tops, peaks, slopes = [], [], []
        for recipe, parameters in zip(recipes, wanted, strict=True):
            tops.append(live.now + live.more(partial(resident.rehearse, recipe)) - batches)
            peaks.append(live.more(partial(worker.rehearse_scoring, recipe)))
            slopes.append(live.more(partial(resident.rehearse_slopes, parameters)))
        shared = live.now - held - batches
    weights = sum(tensor.nbytes for tensor in resident.model.parameters())
    scoring = _Scoring(batches, weights, tuple(peaks), tuple(slopes), wanted, worker.tokens("search"))
    return scoring, _merging(held, shared, tops, slopes, resident)


def _rehearse_merging(
    config: SearchConfig, recipes: Sequence[Recipe], models: Models, wanted: Sequence[tuple[str, ...]]
) -> _Merging:
    with LiveBytes(says_yes=True) as live:  # derivatives ask whether a parameter has a certain value
        resident = rehearsed_models(config, models)
        held, tops, slopes = live.now, [], []
        for recipe, parameters in zip(recipes, wanted, strict=True):
            tops.append(live.now + live.more(partial(resident.rehearse, recipe)))
            slopes.append(live.more(partial(resident.rehearse_slopes, parameters)))
        shared = live.now - held
    return _merging(held, shared, tops, slopes, resident)


def _merging(held: int, shared: int, tops: Sequence[int], slopes: Sequence[int], resident: RehearsedModels) -> _Merging:
    """tops: the most bytes that lived at once during each merge."""
    return _Merging(held, shared, max(0, max(tops) - held - shared), tuple(slopes), resident.traffic)


def _placed(config: SearchConfig, sources: Where, fields: Kept, form: Form) -> SearchConfig:
    """The config with a placement of its own."""
    placed = config.evaluation.model_copy(update={"sources": sources, "fields": fields, "adapters": form})
    return config.model_copy(update={"evaluation": placed})


def _forms(config: SearchConfig, models: Models) -> tuple[Form, ...]:
    """What adapters may be kept as, the fastest first."""
    changed = any(model.weights.products(name) for model in models.values() for name in model.table)
    if not changed:
        return ("expanded",)
    return ("expanded", "factors") if config.evaluation.adapters == "auto" else (config.evaluation.adapters,)


def _private_bytes(model: Model, form: Form) -> int:
    """The bytes of the tensors that are not as they lie in a file, so that no workers can share them.

    form: what tensors that adapters change are kept as.
    """
    weights, private = model.weights, 0
    for name, info in weights.table.items():
        if weights.mapped(name) is None:
            changes = weights.products(name) if form == "factors" else ()
            parts = [matrix for change in changes for matrix in (change.a, change.b)] or [info]
            private += sum(math.prod(part.shape) * dtype_of(part).itemsize for part in parts)
    return private


def _bytes_of_rows(models: Models) -> int:
    """The bytes of the tensors with one row per token of all models, in float32 and in the rows of the base."""
    names = naming_in(models.base.folder).vocabulary
    return 4 * len(models) * sum(math.prod(info.shape) for name, info in models.table.items() if name in names)


def with_choice(config: SearchConfig, placements: Sequence[Placement]) -> Iterator[Placement]:
    """The placements with what is lacking here for each, and with the one that the search takes: the first that the
    config allows and that fits, or else the last.

    config: the search's, resolved.
    placements: the fastest first.
    """
    device, wanted = torch.device(config.evaluation.device), config.evaluation
    told = [replace(placement, lacking=_lacking(config, placement)) for placement in placements]
    allowed = [
        placement
        for placement in told
        if wanted.sources in ("auto", placement.sources, *_same_as(placement.sources, device))
        and wanted.fields in ("auto", placement.fields)
        and wanted.adapters in ("auto", placement.adapters, *_unchanged(placements))
    ]
    fitting = [placement for placement in allowed if placement.lacking is None]
    known = len(allowed) == 1 or device_count(device.type) > 0
    chosen = [*fitting, allowed[-1]][0]
    return (replace(placement, chosen=known and placement is chosen) for placement in told)


def _unchanged(placements: Sequence[Placement]) -> tuple[str, ...]:
    """Where no model has an adapter, it does not matter what adapters are kept as."""
    return ("factors",) if {placement.adapters for placement in placements} == {"expanded"} else ()


def _same_as(sources: Where, device: torch.device) -> tuple[str, ...]:
    """The device's memory is the host's on a CPU."""
    return ("device",) if sources == "host" and not is_accelerator(device) else ()


def _lacking(config: SearchConfig, placement: Placement) -> str | None:
    """What this machine has too little of; None where it has enough, or is not where the workers will be."""
    device, count = torch.device(config.evaluation.device), int(config.workers.num_gpus or 1)
    if is_accelerator(device):
        if not device_count(device.type):
            return None
        free = count * free_memory(device)
        if placement.worker.total > _SPARE * free:
            return f"a worker needs {_gib(placement.worker.total)} of {device.type} memory, but {_gib(free)} are free"
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if placement.host <= _SPARE * there:
        return None
    workers = workers_of_a_node(config)
    return (
        f"{workers} worker{'s need' if workers > 1 else ' needs'} {_gib(placement.host)} of memory, but this machine "
        f"has {_gib(there)}"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def shortage(placement: Placement) -> str | None:
    """A sentence that says what to do, where this machine has too little memory for its workers; None where it has
    enough, and where it cannot be asked.

    placement: the one that the search takes.
    """
    if placement.lacking is None:
        return None
    return (
        f"{placement.lacking}; use fewer workers (workers.count), a smaller evaluation.batch_size, a narrower "
        "evaluation.dtype, or fewer models."
    )


def _engine(config: SearchConfig, weights: int, on_host: bool) -> tuple[int, int]:
    """What vLLM takes on the device, and what it takes of the host beside that."""
    if config.evaluation.backend == "hf":
        return 0, 0
    cache, process = int(config.evaluation.vllm.cache_gib * 2**30), weights + _ENGINE_LIBRARIES
    return (cache + weights + process, 0) if on_host else (cache + weights, process)


def _typical(space: SearchSpace) -> Iterator[Recipe]:
    """The recipe in the middle of the space, once for every choice of every method gene."""
    middle = at(space.genes, np.full(len(space.genes), 0.5))
    places = [index for index, gene in enumerate(space.genes) if gene.kind == "method"]
    if not places:
        yield space.decode(middle)
    for place in places:
        for choice in range(len(space.genes[place].choices)):
            genome = middle.copy()
            genome[place] = choice
            yield space.decode(genome)
