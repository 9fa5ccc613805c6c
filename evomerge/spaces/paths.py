"""Paths as genomes: a row of `hop` genes, each a block of layers or nothing, and a scale for every hop with a block.

Optimizers that move segments read a genome as a list of steps, change the list, and write it back from the left.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomerge.spaces import Condition, Gene, Genome, canonical, categorical

NOTHING = "-"
HOP, GATE, SCALE = "hop", "gate", "scale"
_SWITCH, _BACK, _SKIP = 0.15, 0.1, 0.1


@dataclass(frozen=True, slots=True)
class Step:
    """One hop of a genome.

    block: the index of its block among the gene's choices, from 1 on.
    scale: its scale.
    """

    block: int
    scale: float = 1.0


def block_name(model: str, first: int, last: int) -> str:
    """The name of a block of a model's layers, such as `math:0-3`.

    model: the model's name.
    first: the number of the first layer.
    last: the number of the last layer.
    """
    return f"{model}:{first}-{last}" if last > first else f"{model}:{first}"


def path_genes(blocks: Sequence[str], length: int, scale: Gene | None) -> list[Gene]:
    """The genes of a path.

    blocks: the names of the blocks to choose from.
    length: how many steps there are at most.
    scale: how a step's scale may vary; None where it may not.
    """
    genes = []
    for place in range(length):
        name = f"hop_{place:03d}"
        genes.append(categorical(name, HOP, name, (NOTHING, *blocks), NOTHING))
        if scale is not None:
            shown = (Condition(name, tuple(blocks)),)
            low, high, start, step = scale.low, scale.high, scale.start, scale.step
            genes.append(Gene(f"scale:{name}", SCALE, name, low, high, start, step, when=shown))
    return genes


class PathGenes:
    """Where the steps of a path are among the genes of a genome.

    hops: the positions of the `hop` genes.
    model_count: how many models the blocks come from.
    models: the number of each block's model; blocks count from 1, and entry 0 is -1.
    layers: the first layer of each block, counted alike.
    """

    def __init__(self, genes: Sequence[Gene]) -> None:
        self._genes = tuple(genes)
        self.hops = [index for index, gene in enumerate(genes) if gene.kind == HOP]
        at = {gene.name: index for index, gene in enumerate(genes)}
        self._scales = [at.get(f"scale:{genes[index].name}") for index in self.hops]
        names = genes[self.hops[0]].choices[1:] if self.hops else ()
        models = list(dict.fromkeys(name.partition(":")[0] for name in names))
        self.model_count = len(models)

        self.models = [-1, *(models.index(name.partition(":")[0]) for name in names)]
        self.layers = [-1, *(int(name.partition(":")[2].partition("-")[0]) for name in names)]
        self._order = sorted(set(self.layers[1:]))
        self._at = {place: block for block, place in enumerate(zip(self.layers, self.models, strict=True)) if block}

    def __len__(self) -> int:
        return len(self.hops)

    @property
    def scale(self) -> Gene | None:
        """How the scale of a step may vary."""
        index = self._scales[0]
        return self._genes[index] if index is not None else None

    def following(self, block: int) -> int:
        """The first layer of the block that would follow a block; -1 after the last block."""
        place = self._order.index(self.layers[block]) + 1
        return self._order[place] if place < len(self._order) else -1

    def at_layer(self, layer: int, model: int) -> int:
        """The block that begins at a layer of a model; 0 where there is none.

        layer: the number of the layer.
        model: the number of the model.
        """
        return self._at.get((layer, model), 0)

    def in_model(self, block: int, model: int) -> int:
        """The block of the same layers in another model.

        block: a block.
        model: the number of the other model.
        """
        return self._at[self.layers[block], model]

    def blocks_of(self, genome: Genome) -> Genome:
        """A genome's steps without their scales."""
        return genome[self.hops]

    def scales_of(self, genome: Genome) -> NDArray[np.bool_]:
        """A mask of the genes that are the scales of a genome's steps, shape (dimension,)."""
        scales = np.zeros(len(self._genes), dtype=np.bool_)
        scales[[s for hop, s in zip(self.hops, self._scales, strict=True) if s is not None and genome[hop]]] = True
        return scales

    def read(self, genome: Genome) -> list[Step]:
        """The steps of a canonical genome in order, without the places that hold nothing."""
        return [
            Step(int(genome[hop]), float(genome[scale]) if scale is not None else 1.0)
            for hop, scale in zip(self.hops, self._scales, strict=True)
            if genome[hop]
        ]

    def write(self, steps: Sequence[Step], genome: Genome) -> Genome:
        """A genome with other steps, canonical.

        steps: the steps, as many as there are places; later ones are left out.
        genome: gives the values of all other genes.
        """
        written = np.array(genome)
        written[self.hops] = 0.0
        for (hop, scale), step in zip(zip(self.hops, self._scales, strict=True), steps, strict=False):
            written[hop] = step.block
            if scale is not None:
                written[scale] = step.scale
        return canonical(self._genes, written)


def random_scale(gene: Gene | None, random: np.random.Generator, around: float | None = None) -> float:
    """A random scale; 1 where scales do not vary.

    gene: how scales vary; None where they do not.
    random: where the numbers come from.
    around: the scale that it is near; by default the gene's start.
    """
    if gene is None:
        return 1.0
    center = gene.start if around is None else around
    return float(np.clip(center + gene.step * random.standard_normal(), gene.low, gene.high))


def random_steps(places: PathGenes, random: np.random.Generator) -> list[Step]:
    """A random walk from the first blocks to the last. Now and then it changes models, repeats blocks or skips some.

    places: the genes of the path.
    random: where the numbers come from.
    """
    order = sorted(set(places.layers[1:]))
    model, position, steps = int(random.integers(places.model_count)), 0, list[Step]()
    while position < len(order) and len(steps) < len(places):
        if random.random() < _SWITCH:
            model = int(random.integers(places.model_count))
        steps.append(Step(places.at_layer(order[position], model), random_scale(places.scale, random)))
        turn = random.random()
        if turn < _BACK:
            position = max(0, position + 1 - int(random.geometric(0.5)))
        elif turn < _BACK + _SKIP:
            position += 1 + int(random.geometric(0.5))
        else:
            position += 1
    return steps
