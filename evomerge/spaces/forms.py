"""Forms: ways to write a path as genes, from any order of blocks to common families that a few numbers describe.

A form covers the layers between the pinned ones, and uses the names of models. To add a form: write its genes and how
they become hops, and add its row to `FORMS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise
from typing import Protocol

import numpy as np

from evomerge.config.base import GeneConfig
from evomerge.config.spaces import DataFlowConfig
from evomerge.spaces import Condition, Gene, Genome, at, canonical, categorical
from evomerge.spaces.layer_path import Hop
from evomerge.spaces.paths import GATE, SCALE, PathGenes, Step, block_name, path_genes, random_scale, random_steps

_FLIP = 0.1
CLOSED, OPEN = "closed", "open"


@dataclass(frozen=True, slots=True)
class Region:
    """What a form may use.

    sources: the names of the models.
    start: the first layer of each model.
    end: the layer after the last one.
    room: how many hops the form may give.
    """

    sources: tuple[str, ...]
    start: int
    end: int
    room: int

    def blocks(self, size: int) -> list[tuple[str, int, int]]:
        """(model, first layer, last layer) of every block, model by model. The last block of a model may be shorter
        than `size` layers."""
        return [
            (model, first, min(first + size, self.end) - 1)
            for model in self.sources
            for first in range(self.start, self.end, size)
        ]

    def hops(self, model: str, start: int, end: int) -> list[Hop]:
        """A model's layers, as far as they lie in the region.

        model: the model's name.
        start: the first layer.
        end: the layer after the last one.
        """
        return [Hop(model, layer) for layer in range(max(start, self.start), min(end, self.end))]


class Form(Protocol):
    """A way to write a path as genes."""

    @property
    def genes(self) -> tuple[Gene, ...]:
        """The entries of the form's genome, in order."""
        ...

    def hops(self, genome: Genome) -> list[Hop]:
        """The hops of a canonical genome, in order; empty where it leaves out all layers."""
        ...

    def parent(self, model: str) -> Genome:
        """The genome that comes closest to an unchanged model."""
        ...

    def draw(self, random: np.random.Generator) -> Genome:
        """A random genome whose path goes forward more often than not, since random orders are never any good."""
        ...


class PathForm:
    """Blocks in any order, any number of times."""

    def __init__(self, config: DataFlowConfig, region: Region) -> None:
        self._region, self._blocks = region, region.blocks(config.granularity)
        names = [block_name(*block) for block in self._blocks]
        length = max(1, -(-region.room // config.granularity))
        self.genes = tuple(path_genes(names, length, scale_gene(config.scale)))
        self._places = PathGenes(self.genes)
        self._start = np.array([gene.start for gene in self.genes])

    def hops(self, genome: Genome) -> list[Hop]:
        return [
            Hop(model, layer, step.scale)
            for step in self._places.read(genome)
            for model, first, last in [self._blocks[step.block - 1]]
            for layer in range(first, last + 1)
        ]

    def parent(self, model: str) -> Genome:
        steps = [Step(index) for index, block in enumerate(self._blocks, 1) if block[0] == model]
        return self._places.write(steps, self._start)

    def draw(self, random: np.random.Generator) -> Genome:
        return self._places.write(random_steps(self._places, random), self._start)


def scale_gene(config: GeneConfig) -> Gene | None:
    """How the scale of each hop may vary; None where it is fixed."""
    if config.fixed is not None:
        return None
    start = 1.0 if config.start is None else config.start
    return Gene(SCALE, SCALE, SCALE, config.low, config.high, start, config.step)


class SlotsForm:
    """All blocks of all models in order, repeated `repeats` times. Each has a gate, and may have a scale. This is the
    space of Akiba et al. 2025, section 3.2."""

    def __init__(self, config: DataFlowConfig, region: Region) -> None:
        self._slots = region.blocks(config.granularity) * config.repeats
        self._fixed = config.scale.fixed or 1.0
        scale, genes = scale_gene(config.scale), []
        for number, slot in enumerate(self._slots):
            name = f"slot_{number:03d}:{block_name(*slot)}"
            genes.append(categorical(name, GATE, name, (CLOSED, OPEN), CLOSED))
            if scale is not None:
                when = (Condition(name, (OPEN,)),)
                limits = (scale.low, scale.high, scale.start, scale.step)
                genes.append(Gene(f"scale:{name}", SCALE, name, *limits, when=when))
        self.genes = tuple(genes)
        self._gates = [index for index, gene in enumerate(genes) if gene.kind == GATE]
        self._scale = scale

    def hops(self, genome: Genome) -> list[Hop]:
        return [
            Hop(model, layer, float(genome[gate + 1]) if self._scale is not None else self._fixed)
            for gate, (model, first, last) in zip(self._gates, self._slots, strict=True)
            if genome[gate]
            for layer in range(first, last + 1)
        ]

    def parent(self, model: str) -> Genome:
        first_round = len(set(self._slots))
        return self._opened([slot[0] == model and number < first_round for number, slot in enumerate(self._slots)])

    def _opened(self, gates: Sequence[bool]) -> Genome:
        genome = np.array([gene.start for gene in self.genes])
        genome[self._gates] = np.array(gates, dtype=np.float64)
        return canonical(self.genes, genome)

    def draw(self, random: np.random.Generator) -> Genome:
        """A random genome: the first layers of one model and the other layers of another, with some gates turned
        over."""
        models = list(dict.fromkeys(slot[0] for slot in self._slots))
        before, after = sorted(int(number) for number in random.integers(len(models), size=2))
        cut = int(random.integers(min(slot[1] for slot in self._slots), max(slot[2] for slot in self._slots) + 2))
        wanted = {(models[before], slot[1]) for slot in self._slots if slot[1] < cut}
        wanted |= {(models[after], slot[1]) for slot in self._slots if slot[1] >= cut}
        first_round = len(set(self._slots))
        gates = [slot[:2] in wanted and number < first_round for number, slot in enumerate(self._slots)]
        turned = random.random(len(gates)) < _FLIP
        genome = self._opened([bool(gate) != bool(turn) for gate, turn in zip(gates, turned, strict=True)])
        if self._scale is not None:
            genome[[gate + 1 for gate in self._gates]] = [random_scale(self._scale, random) for _ in self._gates]
        return canonical(self.genes, genome)


@dataclass(frozen=True, slots=True)
class Numbers:
    """A genome's values.

    values: numbers and names of choices, by gene.
    model: the model that counts where no gene chooses one.
    """

    values: Mapping[str, float | str]
    model: str

    def __getitem__(self, name: str) -> int:
        return int(self.values[name])

    def name(self, gene: str) -> str:
        """The choice of a gene; `model` where there is no such gene."""
        return str(self.values.get(gene, self.model))


@dataclass(frozen=True, slots=True)
class FamilyForm:
    """A family of paths that a few numbers describe.

    genes: the numbers.
    build: the numbers' values -> the hops of the path.
    region: what the form may use.
    """

    genes: tuple[Gene, ...]
    build: Callable[[Numbers], list[Hop]]
    region: Region

    def hops(self, genome: Genome) -> list[Hop]:
        pairs = zip(self.genes, genome.tolist(), strict=True)
        values = {gene.name: gene.choices[int(v)] if gene.choices else v for gene, v in pairs}
        return self.build(Numbers(values, self.region.sources[0]))

    def parent(self, model: str) -> Genome:
        return np.array([gene.choices.index(model) if model in gene.choices else gene.start for gene in self.genes])

    def draw(self, random: np.random.Generator) -> Genome:
        return canonical(self.genes, at(self.genes, random.random(len(self.genes))))


def _which(name: str, region: Region, start: int = 0) -> tuple[Gene, ...]:
    """A gene that chooses one of the sources; empty where there is only one source."""
    if len(region.sources) == 1:
        return ()
    return (categorical(name, "model", name, region.sources, region.sources[start]),)


def _whole(name: str, low: int, high: int, start: int) -> Gene:
    step = max(1.0, (high - low) / 6)
    return Gene(name, "layers", name, float(low), float(high), float(min(max(start, low), high)), step, integer=True)


def _skip(config: DataFlowConfig, region: Region) -> Form:
    """The form of a model without a run of its layers (ShortGPT, Men et al. 2024, arXiv:2403.03853)."""
    length = region.end - region.start
    middle = region.start + length // 2
    first = _whole("skip_from", region.start, region.end - 1, middle)
    run = _whole("skip_layers", 0, length - 1, max(1, length // 8))

    def build(n: Numbers) -> list[Hop]:
        before = region.hops(n.name("model"), region.start, n["skip_from"])
        return before + region.hops(n.name("model"), n["skip_from"] + n["skip_layers"], region.end)

    return FamilyForm((*_which("model", region), first, run), build, region)


def _repeat(config: DataFlowConfig, region: Region) -> Form:
    """The form of a model in which a run of layers is repeated."""
    length = region.end - region.start
    first = _whole("repeat_from", region.start, region.end - 1, region.start + length // 2)
    run = _whole("repeat_layers", 1, length, max(1, length // 8))
    times = _whole("repeat_times", 0, config.repeats, 1)

    def build(n: Numbers) -> list[Hop]:
        model, end = n.name("model"), n["repeat_from"] + n["repeat_layers"]
        again = region.hops(model, n["repeat_from"], end) * n["repeat_times"]
        return region.hops(model, region.start, end) + again + region.hops(model, end, region.end)

    return FamilyForm((*_which("model", region), first, run, times), build, region)


def _parallel(config: DataFlowConfig, region: Region) -> Form:
    """The form of a model in which a run of layers works side by side (Sun et al. 2024, arXiv:2407.09298)."""
    return _side_by_side(region, "parallel", ())


def _looped(config: DataFlowConfig, region: Region) -> Form:
    """The form of a model in which a run of layers works side by side, several times (Sun et al. 2024)."""
    return _side_by_side(region, "looped", (_whole("looped_times", 1, config.repeats, config.repeats),))


def _side_by_side(region: Region, name: str, times: tuple[Gene, ...]) -> Form:
    length = region.end - region.start
    first = _whole(f"{name}_from", region.start, region.end - 1, region.start + length // 2)
    run = _whole(f"{name}_layers", 1, length, max(2, length // 4))

    def build(n: Numbers) -> list[Hop]:
        model, start = n.name("model"), n[f"{name}_from"]
        end = start + n[f"{name}_layers"]
        block = region.hops(model, start, end)
        rounds = n[times[0].name] if times else 1
        inside = [replace(hop, block=number) for number in range(rounds) for hop in block]
        return region.hops(model, region.start, start) + inside + region.hops(model, end, region.end)

    return FamilyForm((*_which("model", region), first, run, *times), build, region)


def _reorder(config: DataFlowConfig, region: Region) -> Form:
    """The form of all blocks of a model in any order: each has a number, by which they are sorted (random keys, Bean
    1994)."""
    model = _which("model", region)
    blocks = [block for block in region.blocks(config.granularity) if block[0] == region.sources[0]]
    share = 1.0 / len(blocks)
    keys = [
        Gene(f"place:{block_name('layers', first, last)}", "place", "order", 0.0, 1.0, (index + 0.5) * share, share)
        for index, (_, first, last) in enumerate(blocks)
    ]

    def build(n: Numbers) -> list[Hop]:
        placed = sorted(zip(keys, blocks, strict=True), key=lambda pair: float(n.values[pair[0].name]))
        return [hop for _, (_, first, last) in placed for hop in region.hops(n.name("model"), first, last + 1)]

    return FamilyForm((*model, *keys), build, region)


def _graft(config: DataFlowConfig, region: Region) -> Form:
    """The form of a host with a run of a donor's layers, which replaces the host's layers or follows them."""
    length = region.end - region.start
    first = _whole("graft_from", region.start, region.end - 1, region.start + length // 2)
    run = _whole("graft_layers", 0, length, max(1, length // 4))
    mode = categorical("graft_mode", "mode", "graft_mode", ("replace", "insert"), "replace")

    def build(n: Numbers) -> list[Hop]:
        host, end = n.name("host"), n["graft_from"] + n["graft_layers"]
        kept = n["graft_from"] if n.name("graft_mode") == "replace" else end
        donated = region.hops(n.name("donor"), n["graft_from"], end)
        return region.hops(host, region.start, kept) + donated + region.hops(host, end, region.end)

    return FamilyForm((*_which("host", region), *_which("donor", region, 1), first, run, mode), build, region)


def _upscale(config: DataFlowConfig, region: Region) -> Form:
    """The form of depth up-scaling (SOLAR, Kim et al. 2023, arXiv:2312.15166): the lower layers of one model and then
    the upper layers of another, or of the same, with an overlap."""
    quarter = (region.end - region.start) // 4
    until = _whole("lower_until", region.start, region.end, region.end - quarter)
    since = _whole("upper_from", region.start, region.end, region.start + quarter)

    def build(n: Numbers) -> list[Hop]:
        lower = region.hops(n.name("lower"), region.start, n["lower_until"])
        return lower + region.hops(n.name("upper"), n["upper_from"], region.end)

    return FamilyForm((*_which("lower", region), *_which("upper", region), until, since), build, region)


def _interleave(config: DataFlowConfig, region: Region) -> Form:
    """The form of runs of layers from the models in turn, where each run begins before the last one ended
    (Goliath-120b, alpindale 2023)."""
    length = region.end - region.start
    run = _whole("run_layers", 1, length, max(1, length // 4))
    overlap = _whole("overlap_layers", 0, max(1, length - 1), length // 8)

    def build(n: Numbers) -> list[Hop]:
        stride = max(1, n["run_layers"] - n["overlap_layers"])
        turn = region.sources.index(n.name("first"))
        hops: list[Hop] = []
        for number, start in enumerate(count(region.start, stride)):
            model = region.sources[(turn + number) % len(region.sources)]
            hops += region.hops(model, start, start + n["run_layers"])
            if start + n["run_layers"] >= region.end:
                return hops
        return hops

    return FamilyForm((*_which("first", region), run, overlap), build, region)


FORMS: dict[str, Callable[[DataFlowConfig, Region], Form]] = {
    "path": PathForm,
    "slots": SlotsForm,
    "skip": _skip,
    "repeat": _repeat,
    "parallel": _parallel,
    "looped": _looped,
    "reorder": _reorder,
    "graft": _graft,
    "upscale": _upscale,
    "interleave": _interleave,
}


def distances(hops: Sequence[Hop]) -> list[int]:
    """For each hop but the first, how many layers it lies away from the layer that would follow the hop before."""
    return [abs(after.layer - before.layer - 1) for before, after in pairwise(hops)]
