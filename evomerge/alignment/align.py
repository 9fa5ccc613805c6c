"""Writes a model that has been aligned with another one, and says what that brought."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.alignment.structure import Permutations, Structure, structure_of
from evomerge.errors import InputError, choices
from evomerge.merging.sources.models import Model, find_models
from evomerge.merging.sources.tensor_files import dtype_of
from evomerge.merging.sources.tokenizers import read_tokenizer, token_ids
from evomerge.merging.sources.weights import RECIPE
from evomerge.recipe import load as load_recipe
from evomerge.seen import encoded

if TYPE_CHECKING:
    import torch

WAYS = ("weights", "activations")
NOTES = "alignment.json"  # what an aligned model has been made of, beside its weights
_NEARER = 0.99  # the share of the distance that must be left at most
_COPIED = (
    *("config.json", "generation_config.json", "README.md", "tokenizer*", "special_tokens_map.json"),
    *("added_tokens.json", "vocab*", "merges.txt", "*.jinja", "*.model"),
)


@dataclass(frozen=True, slots=True)
class Barrier:
    """How much worse the middle of two models is than both, in nats per token of texts (Frankle et al. 2020).

    ends: the mean loss of the two models.
    middle: the loss of their average.
    """

    ends: float
    middle: float

    @property
    def height(self) -> float:
        """By how much the middle is worse."""
        return self.middle - self.ends


@dataclass(frozen=True, slots=True)
class Alignment:
    """What an alignment brought.

    moved: how many places of each kind have moved.
    before: the distance of the model from the target, as a share of the target's norm.
    after: the same once it is aligned.
    barriers: before and after; None where no texts were given.
    """

    moved: dict[str, int]
    before: float
    after: float
    barriers: tuple[Barrier, Barrier] | None

    def doubt(self, name: str) -> str | None:
        """A sentence where the model came no nearer to the target, as one that descends from it; None elsewhere.

        name: what the model is called.
        """
        if self.after < _NEARER * self.before:
            return None
        return (
            f"alignment brought {name} no nearer to the target ({self.before:.3f} of its norm away before, "
            f"{self.after:.3f} after); a model that descends from the target needs none."
        )


@dataclass(frozen=True, slots=True)
class Reading:
    """A text as a model reads it.

    tokens: its tokens.
    first: the first token that counts for the loss.
    """

    tokens: tuple[int, ...]
    first: int

    @property
    def ids(self) -> "torch.Tensor":
        """The tokens as a model takes them, shape (1, tokens)."""
        import torch

        return torch.tensor([self.tokens])


def readings(model: Model, texts: Sequence[str]) -> list[Reading]:
    """Texts as a model reads them; those without tokens are left out.

    Where a text has a tab, only the tokens behind it count: a model that learned answers alone expects no questions.

    model: its tokenizer reads them.
    texts: the texts.
    """
    tokenizer = read_tokenizer(model.folder) if texts else None
    read = []
    for text in texts:
        question, tab, answer = text.partition("\t")
        tokens = tuple(token_ids(tokenizer, question + answer)[0].tolist())
        read.append(Reading(tokens, token_ids(tokenizer, question).shape[1] if tab else 1))
    return [reading for reading in read if reading.tokens]


def read_texts(file: Path) -> list[str]:
    """The lines of a file that are not empty. Raises InputError where it cannot be read.

    A tab in a line ends what is asked; the loss is that of what follows.

    file: in UTF-8.
    """
    try:
        lines = [line.strip(" \r") for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); expected text in UTF-8, one text a line.") from None
    if not any(lines):
        raise InputError(f"{file}: holds no text; expected one text a line.")
    return [line for line in lines if line]


def align(reference: str, target: str, out: Path, by: str = "weights", texts: Sequence[str] = ()) -> Alignment:
    """Writes a model whose places are in the order of another one's. It computes what it computed before.

    reference: the model that moves.
    target: the model that stays.
    out: the folder to write; it must not hold anything yet.
    by: what is compared, `weights` or `activations`. Activations need texts.
    texts: what the models read to compare activations, and to measure the barrier between them.
    Raises InputError for models that cannot be aligned.
    """
    from evomerge.merging.streamed.shards import check_writable

    if by not in WAYS:
        raise InputError(f"--by is '{by}'; {choices(by, WAYS)}.")
    check_writable(out)
    if by == "activations" and not texts:
        raise InputError("--by activations compares what models do with texts; name a file of them (--texts FILE).")
    models = find_models(target, [target, reference])
    read = readings(models.base, texts)
    if texts and not any(len(reading.tokens) > reading.first for reading in read):
        raise InputError("--texts: no text has a token that counts; give a file with one text a line.")
    return align_model(models.base, models[reference], out, by, read, read)


def align_model(
    target: Model, model: Model, out: Path, by: str, read: Sequence[Reading], judged: Sequence[Reading]
) -> Alignment:
    """Writes a model whose places are in the order of another one's.

    target: the model that stays.
    model: the model that moves.
    out: the folder to write; it must not hold anything yet.
    by: what is compared, `weights` or `activations`.
    read: what the models read to compare activations.
    judged: what they read to measure the barrier between them; it is not measured where nothing of it counts.
    Raises InputError for models that cannot be aligned.
    """
    from evomerge.alignment.activations import match_activations
    from evomerge.alignment.matching import match_weights
    from evomerge.merging.streamed.shards import staged, write_weights

    structure = common_structure(target, model)
    found = match_activations(target, model, structure, read) if by == "activations" else None
    found = found or match_weights(target, model, structure)
    layout = {name: (info.shape, dtype_of(info)) for name, info in model.table.items()}
    layout = dict(sorted(layout.items(), key=lambda item: -item[1][1].itemsize))
    here = Permutations.identity(structure)
    judged = [reading for reading in judged if len(reading.tokens) > reading.first]
    barriers = (_barrier(target, model, here, judged), _barrier(target, model, found, judged)) if judged else None
    brought = Alignment(found.moved, _distance(target, model, here), _distance(target, model, found), barriers)
    with staged(out) as folder:
        write_weights(folder, layout, _moved(model, found, list(layout)), 5_000_000_000)
        for file in sorted({file for pattern in _COPIED for file in model.folder.glob(pattern)}):
            shutil.copyfile(file, folder / file.name)
        _keep_seen(model, folder)
        notes = {**asdict(brought), "subject": subject(target, model, by, read)}
        (folder / NOTES).write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")
    return brought


def subject(target: Model, model: Model, by: str, read: Sequence[Reading]) -> str:
    """16 hexadecimal digits that stand for what an alignment is made of. The parameters are those of `align_model`."""
    tokens = [reading.tokens for reading in read] if by == "activations" else []
    content = json.dumps([target.identity, model.identity, by, tokens])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def noted(folder: Path) -> tuple[str, Alignment] | None:
    """What an aligned model is made of (`subject`), and what its alignment brought; None where a folder holds none."""
    try:
        notes = json.loads((folder / NOTES).read_text(encoding="utf-8"))
        barriers = notes.pop("barriers")
        found = None if barriers is None else (Barrier(**barriers[0]), Barrier(**barriers[1]))
        return str(notes.pop("subject")), Alignment(**notes, barriers=found)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def common_structure(target: Model, model: Model) -> Structure:
    """The structure of two models. Raises InputError where they differ, or where it is not known what moves in them."""
    structure = structure_of(target)
    shapes = [{name: info.shape for name, info in own.table.items()} for own in (target, model)]
    if shapes[0] != shapes[1] or structure_of(model) != structure:
        different = sorted(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))
        raise InputError(
            f"{model.reference}: has another shape than {target.reference}"
            f"{f' ({different[0]})' if different else ''}; only models of one shape can be aligned."
        )
    return structure


def _moved(model: Model, found: Permutations, names: Sequence[str]) -> "Iterator[tuple[str, torch.Tensor]]":
    for name in names:
        yield name, found.apply(name, model.weights.read(name))
        model.weights.close()


def _keep_seen(model: Model, folder: Path) -> None:
    """Keeps what the searches saw that made the model, so that it is never held out. The weights are others now."""
    recipes = [source / RECIPE for source in model.folders if (source / RECIPE).is_file()]
    if recipes:
        recipe, seen = load_recipe(recipes[0]), model.seen
        changes = {"fingerprint": None, "seen": encoded(seen) if seen else None}
        noted = recipe.model_copy(update={"evomerge": recipe.evomerge.model_copy(update=changes)})
        (folder / RECIPE).write_text(noted.to_yaml(), encoding="utf-8")


def _distance(target: Model, model: Model, found: Permutations) -> float:
    """The norm of the difference of a model, moved, from the target, as a share of the target's norm."""
    apart = whole = 0.0
    for name, moved in _moved(model, found, list(model.table)):
        own = target.weights.read(name).double()
        apart += float((moved.double() - own).square().sum())
        whole += float(own.square().sum())
        target.weights.close()
    return math.sqrt(apart / whole) if whole else 0.0


def _barrier(target: Model, model: Model, found: Permutations, judged: Sequence[Reading]) -> Barrier:
    """The barrier between the target and a model that is moved."""
    import torch

    from evomerge.merging.building import load_model

    built = load_model(target.folder, torch.float32)
    own = dict(built.named_parameters())

    def loss(share: float) -> float:
        """The loss of the average in which the moved model has a share."""
        with torch.no_grad():
            for name, moved in _moved(model, found, list(model.table)):
                own[name].copy_(target.weights.read(name).float() * (1 - share) + moved.float() * share)
        return mean_loss(built, judged)

    return Barrier(ends=(loss(0.0) + loss(1.0)) / 2, middle=loss(0.5))


def mean_loss(model: Any, judged: Sequence[Reading]) -> float:
    """The mean negative log-likelihood of the tokens that count, in nats.

    model: a causal model of transformers.
    judged: what it reads; each has a token that counts.
    """
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for reading in judged:
            ids, first = reading.ids, reading.first
            chances = model(input_ids=ids, use_cache=False).logits[0, first - 1 : -1].double().log_softmax(-1)
            total -= float(chances.gather(1, ids[0, first:, None]).sum())
            count += ids.shape[1] - first
    return total / count
