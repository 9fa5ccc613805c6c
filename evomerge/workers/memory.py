"""Memory: how much a worker needs, measured by rehearsing its work on PyTorch's meta device, where tensors have no
data.
"""

import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evomerge.config.search import SearchConfig
from evomerge.evaluation.loading import Target
from evomerge.merging.sources.models import Models
from evomerge.recipe import Recipe
from evomerge.spaces import SearchSpace, at
from evomerge.workers.worker import Worker

_QUESTIONS = tuple(getattr(torch.ops.aten, name).default for name in ("item", "is_nonzero", "_local_scalar_dense"))
_LIBRARIES = 540 << 20  # of a process that has imported torch, transformers and lm-eval
_COMPILER = 100 << 20  # more, once it has compiled something
# glibc's allocator keeps memory that candidates have freed (it returns only large pieces at once): this many times what
# a candidate takes, up to a limit; measured on models of 135 million parameters.
_KEPT_OF_CANDIDATES, _MOST_KEPT_OF_CANDIDATES = 2.0, 192 << 20
_ENGINE_LIBRARIES = 1640 << 20  # of a process with an engine, apart from weights and cache


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
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return made

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


def plan_memory(
    config: SearchConfig, space: SearchSpace, models: Models | None = None, targets: Mapping[str, Target] | None = None
) -> MemoryPlan:
    """The memory that a worker of a search needs, measured by rehearsing the middle of the space with every method.

    config: the search's, resolved.
    space: the search's.
    models: the config's models, where their headers are read already; by default they are read here.
    targets: the config's tasks, where they are loaded already; by default they are loaded here.
    """
    with LiveBytes(says_yes=True) as live:  # transformers asks whether a batch is free of padding
        worker = Worker(config, models, targets, rehearsal=True)
        held = live.now
        for recipe in _typical(space):
            worker.rehearse(recipe)
        shared, candidate = live.now - held, live.peak - live.now
        kept = min(_KEPT_OF_CANDIDATES * candidate, _MOST_KEPT_OF_CANDIDATES)
        host = _LIBRARIES + _COMPILER * (config.evaluation.compile is True) + int(kept)
        on_host = config.evaluation.device == "cpu"
        return MemoryPlan(held, shared, candidate, host if on_host else 0, _engine(config, worker, on_host))


def _engine(config: SearchConfig, worker: Worker, on_host: bool) -> int:
    if config.evaluation.backend == "hf":
        return 0
    weights: int = sum(tensor.nbytes for tensor in worker.models.model.parameters())
    cache = int(config.evaluation.vllm.cache_gib * 2**30)
    return cache + (2 * weights + _ENGINE_LIBRARIES if on_host else weights)


def shortage(config: SearchConfig, plan: MemoryPlan) -> str | None:
    """A sentence that says what to do, where this machine has too little memory for its workers.

    None where it has enough, and where the workers do not use its memory but a GPU's.

    config: the search's, resolved.
    plan: what one worker needs.
    """
    if config.evaluation.device != "cpu":
        return None
    workers = 1 if config.workers.pool == "local" else config.workers.count or os.cpu_count() or 1
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if workers * plan.total <= there:
        return None
    return (
        f"{workers} worker{'s' * (workers > 1)} need {workers * plan.total / 2**30:.1f} GiB, but this machine has "
        f"{there / 2**30:.1f}; use fewer (workers.count), a smaller evaluation.batch_size, a narrower "
        "evaluation.dtype, or fewer models."
    )


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
