"""Measures statistics of the model in memory, for the methods that need them, and writes them to the disk.

Sums are kept in float32, for as many layers at a time as `ROOM` takes, and written before the next layers are measured.
So memory does not grow with the depth of a model, and a deep model reads its items several times.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from evomerge.errors import WorkFailed
from evomerge.evaluation.activations import PLACES, head_of, name_of
from evomerge.evaluation.activations import outputs as outputs_of_layers
from evomerge.evaluation.calibration import Calibration
from evomerge.evaluation.packing import Tokens
from evomerge.layers import is_layer, layer_index
from evomerge.merging.methods.base import Kind
from evomerge.merging.methods.kernels import checksum, fingerprint_of
from evomerge.merging.naming import Naming
from evomerge.merging.resident.models import ResidentModels
from evomerge.merging.sources.statistics import NOTES, Readable, unfinished
from evomerge.merging.streamed.shards import Layout, write_weights
from evomerge.recipe import Recipe
from evomerge.workers.products import Matrix, Products, experts_apart

ROOM = 2 << 30  # bytes of the sums that are kept at a time
_SHARD = 5 * 10**9
Tensors = Iterator[tuple[str, torch.Tensor]]
T = TypeVar("T")


@dataclass
class Measurement:
    """Statistics that are measured while they are written.

    layout: the shape and dtype of each tensor, by name, in the order in which they come.
    tensors: the tensors, each measured when it is asked for.
    notes: what statistics.json says besides; it is complete once all tensors have been asked for.
    """

    layout: Layout
    tensors: Tensors
    notes: dict[str, Any] = field(default_factory=dict)


def store(folder: Path, kind: Kind, subject: str, notes: Mapping[str, Any], measured: Measurement) -> str:
    """Writes statistics into a folder of their own, whole or not at all, and returns its name.

    folder: where the folder is made.
    kind: the kind of statistic.
    subject: what was measured (`statistics.subject`).
    notes: what statistics.json says.
    measured: the statistics.
    Raises WorkFailed where they are not finite, or cannot be written.
    """
    sums: list[int] = []

    def counted() -> Tensors:
        for name, tensor in measured.tensors:
            if not torch.isfinite(tensor).all():
                raise WorkFailed(f"statistics: the {kind} of {name} are not finite; use a wider evaluation.dtype.")
            sums.append(int(checksum(tensor, name)))
            yield name, tensor

    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=unfinished(kind), dir=folder))
        try:
            write_weights(made, measured.layout, counted(), _SHARD)
            content = {"kind": kind, **notes, **measured.notes}
            (made / NOTES).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            name = f"{kind}-{subject}-{fingerprint_of(sums)}"
            for file in made.iterdir():
                file.chmod(0o644)
            made.chmod(0o755)
            if not (folder / name / NOTES).exists():  # another worker may have been faster
                shutil.rmtree(folder / name, ignore_errors=True)  # nothing reads a folder without notes
                made.rename(folder / name)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise WorkFailed(f"{folder}: the statistics could not be written ({error}); free some space.") from None
    return name


# Fisher information


def fisher(model: Any, naming: Naming, calibration: Calibration, drawn: bool, room: int = ROOM) -> Measurement:
    """The diagonal Fisher information of a model: the mean over items of the squared gradients of their likelihoods
    (Matena and Raffel 2022, eq. 2).

    model: the model, whose weights are not changed.
    naming: the names of its tensors in checkpoints.
    calibration: the items.
    drawn: whether answers are drawn from the model's predictions; else they are the references.
    room: bytes of the sums that are kept at a time.
    """
    merged = set(naming.merged)
    held = dict(model.named_parameters())
    units = [(names, members) for names, members in _units(naming, held) if merged.issuperset(names)]
    layout = {name: (naming.shapes[name], torch.float32) for names, _ in units for name in names}
    notes: dict[str, Any] = {}

    def tensors() -> Tensors:
        total, count = 0.0, 0
        for window in _windows(units, lambda unit: 4 * sum(held[name].numel() for name in unit[1]), room):
            sums = _squared(model, {name: held[name] for _, members in window for name in members}, calibration, drawn)
            for names, members in window:
                for name, tensor in _named(naming, names, {member: sums[member] for member in members}):
                    total += float(tensor.double().sum())
                    count += tensor.numel()
                    yield name, tensor
        notes["mean"] = total / max(1, count) or 1.0

    return Measurement(layout, tensors(), notes)


def _units(naming: Naming, held: Mapping[str, nn.Parameter]) -> Iterator[tuple[list[str], list[str]]]:
    """Tensors of the checkpoint with the parameters in memory that they are made of: one, or where they are made of
    several, all those of a layer."""
    pieces: dict[str, list[str]] = {}
    for name, piece in naming.pieces.items():
        pieces.setdefault(piece.tensor, []).append(name)
    for member in held:
        if member in pieces:
            yield pieces[member], [member]
    for layer in dict.fromkeys(map(layer_index, naming.made)):
        names = [name for name in naming.made if layer_index(name) == layer]
        yield names, [member for member in held if member not in pieces and layer_index(member) == layer]


def _named(naming: Naming, names: Sequence[str], sums: Mapping[str, torch.Tensor]) -> Tensors:
    made = naming.made_of(sums) if any(name not in naming.pieces for name in names) else {}
    for name in names:
        piece = naming.pieces.get(name)
        yield name, (made[name] if piece is None else piece.of(sums[piece.tensor])).contiguous()


def _squared(
    model: Any, wanted: Mapping[str, nn.Parameter], calibration: Calibration, drawn: bool
) -> dict[str, torch.Tensor]:
    """The mean of the squared gradients over all items, by parameter, on the CPU."""
    sums = {name: torch.zeros_like(own, dtype=torch.float32) for name, own in wanted.items()}
    with torch.enable_grad(), _following(model, wanted.values()):
        for number in range(len(calibration.items)):
            torch.autograd.backward(calibration.loss(model, number, drawn))
            for name, own in wanted.items():
                if own.grad is not None:
                    sums[name] += own.grad.to(torch.float32).square()
                    own.grad = None
    return {name: total.div_(len(calibration.items)).cpu() for name, total in sums.items()}


@contextmanager
def _following(model: Any, wanted: Collection[nn.Parameter]) -> Iterator[None]:
    """A context in which gradients are taken by some parameters alone."""
    chosen = {id(own) for own in wanted}
    before = [(own, own.requires_grad) for own in model.parameters()]
    try:
        for own, _ in before:
            own.requires_grad_(id(own) in chosen)
        yield
    finally:
        for own, required in before:
            own.requires_grad_(required)
            own.grad = None


def _windows(units: Sequence[T], size: Callable[[T], int], room: int) -> Iterator[list[T]]:
    """Units in their order, in runs whose sizes add up to at most `room`; a larger unit is alone."""
    window: list[T] = []
    filled = 0
    for unit in units:
        if window and filled + size(unit) > room:
            yield window
            window, filled = [], 0
        window.append(unit)
        filled += size(unit)
    if window:
        yield window


# What goes into linear layers


class _Enough(Exception):
    """Ends a forward pass behind the last layer that is measured."""


@dataclass(frozen=True)
class Inputs:
    """What weight matrices of a model read, one or several that read the same.

    owner: the checkpoint's name of the first one, under which the statistic is kept.
    size: how many channels the input has.
    layer: the number of the layer that they belong to.
    """

    owner: str
    size: int
    layer: int


@dataclass
class Readers:
    """Which weight matrices of a model's layers read which inputs, by their names in checkpoints.

    shared: the owner of the input for the name of each matrix.
    transposed: the names of those that are stored with a row for each channel of the inputs, as in GPT-2.
    """

    shared: dict[str, str] = field(default_factory=dict)
    transposed: list[str] = field(default_factory=list)

    def add(self, owner: str, names: Mapping[str, bool]) -> None:
        """Notes matrices that read the input of `owner`; for each name, whether it is transposed."""
        self.shared.update(dict.fromkeys(names, owner))
        self.transposed += [name for name, transposed in names.items() if transposed]


def inputs_of(model: Any, naming: Naming, row: torch.Tensor) -> tuple[list[Inputs], Readers]:
    """The inputs of the weight matrices of a model's layers, and which matrices read them.

    model: the model.
    naming: the names of its tensors in checkpoints.
    row: what the model reads to find out which matrices read the same; shape (1, length). Experts count that it does
        not reach.
    """
    held = dict(model.named_parameters())
    found: list[Inputs] = []
    readers = Readers()
    seen: list[tuple[int, torch.Tensor, str]] = []  # kept alive, so that no other input gets its address

    def look(matrix: Matrix, names: Mapping[str, bool], given: torch.Tensor) -> None:
        layer = layer_index(first := next(iter(names)))
        assert layer is not None
        if first in readers.shared:
            return
        seen[:] = [each for each in seen if each[0] == layer]
        alike = matrix.alike(held[matrix.tensor])
        owner = next((owner for _, other, owner in seen if other is given and len(alike) == 1), None)
        if owner is not None:
            readers.add(owner, names)
            return
        seen.append((layer, given, first))
        for own in map(products.names.of, alike):
            owner = next(iter(own))
            found.append(Inputs(owner, matrix.shape[0], layer))
            readers.add(owner, own)

    products = Products(model, naming, look)
    with torch.no_grad(), experts_apart(model), products:
        model(input_ids=row.to(model.device), use_cache=False)
    return sorted(found, key=lambda each: each.layer), readers


def inputs(
    kind: Kind, model: Any, naming: Naming, calibration: Calibration, batch_size: int, room: int = ROOM
) -> Measurement:
    """What goes into the linear layers of a model: the mean of x x' over all tokens (`grams`), or of the magnitudes
    (`activations`). For an expert all tokens are those that are sent to it; zeros where there are none.

    kind: which of the two.
    model: the model.
    naming: the names of its tensors in checkpoints.
    calibration: the items, whose rows the model reads.
    batch_size: how many rows it reads at a time.
    room: bytes of the sums that are kept at a time.
    """
    batches = calibration.batches(batch_size)
    found, readers = inputs_of(model, naming, batches[0][:1])
    order = 2 if kind == "grams" else 1
    layout = {each.owner: ((each.size,) * order, torch.float32) for each in found}

    def tensors() -> Tensors:
        for window in _windows(found, lambda each: 4 * each.size**order, room):
            yield from gathered(model, naming, window, batches, order).items()

    return Measurement(layout, tensors(), asdict(readers))


@torch.no_grad()
def gathered(
    model: Any, naming: Naming, wanted: Sequence[Inputs], batches: Sequence[torch.Tensor], order: int
) -> dict[str, torch.Tensor]:
    """The mean over all tokens of x x' (`order` 2) or |x| (`order` 1) of some inputs, by owner, on the CPU.

    model: the model, which reads no further than the last of these inputs.
    naming: the names of its tensors in checkpoints.
    wanted: the inputs.
    batches: what the model reads.
    order: see above.
    """
    modules = dict(model.named_modules())
    last = max(each.layer for each in wanted)
    end = next(name for name in modules if is_layer(name) and layer_index(f"{name}.") == last)
    sums: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys((each.owner for each in wanted), 0)

    def add(_: Matrix, names: Mapping[str, bool], given: torch.Tensor) -> None:
        owner = next(iter(names))
        if owner not in counts:
            return
        rows = given.detach().flatten(0, -2).to(torch.float32)
        total = rows.T @ rows if order == 2 else rows.abs().sum(dim=0)
        sums[owner] = sums[owner].add_(total) if owner in sums else total
        counts[owner] += len(rows)

    def stop(*_: Any) -> None:
        raise _Enough

    with ExitStack() as stack:
        stack.callback(modules[end].register_forward_hook(stop).remove)
        stack.enter_context(experts_apart(model))
        stack.enter_context(Products(model, naming, add))
        for batch in batches:
            with suppress(_Enough):
                model(input_ids=batch.to(model.device), use_cache=False)
    nothing = {each.owner: torch.zeros((each.size,) * order) for each in wanted}
    return nothing | {owner: total.div_(max(1, counts[owner])).cpu() for owner, total in sums.items()}


def _of(held: Mapping[str, Readable], _: Kind, reference: str) -> Readable:
    return held[reference]


@dataclass(frozen=True, slots=True)
class _InMemory:
    """Gram matrices that are not written yet, as a method reads them (`statistics.Readable`).

    grams: by owner.
    readers: which weights read which inputs.
    """

    grams: Mapping[str, torch.Tensor]
    readers: Readers
    mean: float = 1.0

    def tensor_of(self, name: str) -> str | None:
        own = self.readers.shared.get(name)
        return own if own in self.grams else None

    def transposed(self, name: str) -> bool:
        return name in self.readers.transposed

    def read(self, name: str) -> torch.Tensor:
        return self.grams[name]


def merged_inputs(
    models: ResidentModels, recipe: Recipe, naming: Naming, calibrations: Sequence[Calibration], batch_size: int
) -> Measurement:
    """The mean of x x' over all tokens for what goes into each model's linear layers, where the layers before are
    merged already (Nguyen et al. 2025): layer by layer, each is measured with every model's own weights, and merged.

    models: the models, of which the one in memory is written over.
    recipe: merges them by RegMean++.
    naming: the names of tensors in checkpoints.
    calibrations: the items of each model, in the order of the recipe.
    batch_size: how many rows are read at a time.
    """
    plan = models.plan(recipe)
    sources = recipe.fine_tunes
    rows = [calibration.batches(batch_size) for calibration in calibrations]
    found, readers = inputs_of(models.model, naming, rows[0][0][:1])
    by_layer = {
        layer: [each for each in found if each.layer == layer] for layer in sorted({each.layer for each in found})
    }
    layout = {
        f"{place}:{each.owner}": ((each.size, each.size), torch.float32)
        for members in by_layer.values()
        for place in range(len(sources))
        for each in members
    }

    def tensors() -> Tensors:
        outside = [tensor for tensor in plan.tensors if layer_index(tensor.name) is None]
        models.merge_some(plan, outside)
        for layer, members in by_layer.items():
            inside = [tensor for tensor in plan.tensors if layer_index(tensor.name) == layer]
            held: dict[str, Readable] = {}
            for place, reference in enumerate(sources):
                models.put(reference, [tensor.name for tensor in inside])
                grams = gathered(models.model, naming, members, rows[place], 2)
                yield from ((f"{place}:{owner}", gram) for owner, gram in grams.items())
                held[reference] = _InMemory(grams, readers)
            models.merge_some(plan, inside, partial(_of, held))

    return Measurement(layout, tensors(), asdict(readers))


# What comes out of layers


def outputs(model: Any, rows: Sequence[Tokens], batch_size: int) -> Measurement:
    """What a model's layers put out at the last tokens of some rows, for each row a tensor of shape (layers, tokens,
    channels), and its logits, shape (vocabulary,) (`activations.outputs`). In the model's dtype.

    model: the model.
    rows: what it reads, the longest first.
    batch_size: how many rows it reads at a time.
    """
    with torch.no_grad():
        layers, logits = outputs_of_layers(model, rows[-1:])
    channels, tokens = layers[0].shape[-1], {row: min(len(row), PLACES) for row in rows}
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for row in rows:
        layout[name_of(row)] = (len(layers), tokens[row], channels), layers[0].dtype
        layout[head_of(row)] = logits.shape[1:], logits.dtype

    @torch.no_grad()
    def tensors() -> Tensors:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            hidden, heads = outputs_of_layers(model, batch)
            put_out = torch.stack([layer.cpu() for layer in hidden], dim=1)
            for row, own, head in zip(batch, put_out, heads.cpu(), strict=True):
                yield name_of(row), own[:, : tokens[row]].contiguous()
                yield head_of(row), head.contiguous()

    return Measurement(layout, tensors())
