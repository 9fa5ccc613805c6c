"""Writes a recipe's merge as a checkpoint, and keeps it only where its fingerprint is the one that was scored."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.devices import resolve_dtype
from evomerge.errors import WorkFailed
from evomerge.export.card import model_card
from evomerge.export.licenses import Verdict, combined, stated_license
from evomerge.export.names import public_names
from evomerge.merging.sources.located import located
from evomerge.merging.sources.models import Models, find_models
from evomerge.merging.sources.preflight import preflight
from evomerge.merging.sources.statistics import Shelf, shelf_of
from evomerge.merging.sources.tensor_files import torch_dtypes
from evomerge.merging.sources.weights import RECIPE
from evomerge.recipe import Provenance, Recipe
from evomerge.seen import encoded
from evomerge.versions import versions

if TYPE_CHECKING:
    from evomerge.merging.streamed.merge import StreamedMerge


@dataclass(frozen=True, slots=True)
class ReadyMerge:
    """A recipe that is worked out and checked, so that its merge can be written.

    recipe: the merge's, with its models located.
    models: those of the merge.
    where: the recipe's file, for messages.
    device: where the merge is computed.
    dtype: that of the output.
    shelf: where statistics of the models are.
    verdict: the merge's license and the warnings about it.
    merge: what writes it.
    """

    recipe: Recipe
    models: Models
    where: str
    device: str
    dtype: str
    shelf: Shelf
    verdict: Verdict
    merge: "StreamedMerge"

    def write(self, attempt: "Callable[[StreamedMerge], str]") -> tuple[str, bool]:
        """The fingerprint of what was written, and whether the recipe recorded the same one.

        Where it recorded another, it is tried again with adapters as earlier versions read them. What was tried last is
        what stays.

        attempt: writes a merge, over what was written before, and returns its fingerprint.
        Raises WorkFailed where no attempt has the recorded fingerprint.
        """
        from evomerge.merging.streamed.merge import StreamedMerge

        recorded, found = self.recipe.evomerge.fingerprint, attempt(self.merge)
        for models in list(self.models.readings())[1:] if recorded not in (None, found) else []:
            statistics = self.shelf.finder(models)
            earlier = attempt(StreamedMerge(self.recipe, models, self.where, self.device, self.dtype, statistics))
            if earlier == recorded:
                return earlier, True
        if recorded not in (None, found):
            raise WorkFailed(_mismatch(self.where, str(recorded), found, self.recipe.evomerge))
        return found, recorded is not None

    def noted(self, fingerprint: str) -> Recipe:
        """The recipe as it lies beside the weights: with their fingerprint, and all items that a search saw on the way.

        fingerprint: that of the merged weights.
        """
        seen = self.recipe.evomerge.digests | self.models.seen
        noted = {"fingerprint": fingerprint, "seen": encoded(seen) if seen else None}
        return self.recipe.model_copy(update={"evomerge": self.recipe.evomerge.model_copy(update=noted)})


def make_ready(
    recipe: Recipe, where: str, device: str, statistics: Path | None, warn: Callable[[str], None]
) -> ReadyMerge:
    """Locates a recipe's models, checks them, and works the merge out.

    recipe: the merge's.
    where: the recipe's file, for messages.
    device: where the merge is computed.
    statistics: a folder of statistics, for methods that need some; those of the recipe's run and those beside the
        recipe are looked at, too.
    warn: is told what the user should know.
    Raises InputError for a recipe that cannot be used.
    """
    from evomerge.merging.streamed.merge import StreamedMerge

    recipe = located(recipe)
    models = find_models(recipe.references[0], recipe.references)
    for warning in preflight(models, same_tensors=False):
        warn(warning)
    dtype = recipe.out_dtype or recipe.dtype or resolve_dtype("auto", torch_dtypes(models.base.table))
    shelf = shelf_of(recipe, where, statistics)
    merge = StreamedMerge(recipe, models, where, device, dtype, shelf.finder(models))
    names = public_names(recipe)
    verdict = combined(
        {names.get(reference, reference): stated_license(model.folders) for reference, model in models.items()}
    )
    return ReadyMerge(recipe, models, where, device, dtype, shelf, verdict, merge)


def merge(
    recipe: Recipe,
    out: Path,
    where: str,
    device: str = "cpu",
    *,
    shard_size: str = "5GB",
    tokenizer: bool = True,
    card: bool = True,
    statistics: Path | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> tuple[str, bool]:
    """Writes a recipe's checkpoint. Returns its fingerprint, and whether the recipe recorded the same fingerprint.

    False means that the recipe recorded none.

    recipe: the merge's.
    out: the folder to write; it must not hold anything yet.
    where: the recipe's file, for messages.
    device: where the merge is computed.
    shard_size: the largest size of a file of weights, as in 5GB (bytes) or 5B (parameters).
    tokenizer: whether the tokenizer is written too.
    card: whether a model card is written too.
    statistics: see `make_ready`.
    warn: is told what the user should know.
    Raises InputError for a recipe or folder that cannot be used, and WorkFailed, leaving nothing, where the recipe
    records another fingerprint than the merge has.
    """
    import torch

    from evomerge.merging.streamed.merge import stored_fingerprint
    from evomerge.merging.streamed.shards import check_writable, parse_size, staged

    check_writable(out)
    ready = make_ready(recipe, where, device, statistics, warn)
    size = parse_size(shard_size, getattr(torch, ready.dtype).itemsize)
    for warning in ready.verdict.warnings:
        warn(warning)
    if ready.merge.unknown_tokens:
        shown = ", ".join(ready.merge.unknown_tokens[:8])
        warn(f"{where}: no model has an embedding for {shown}; zeros are taken (tokenizer.tokens can name a source).")
    with staged(out) as folder:
        fingerprint, checked = ready.write(lambda merge: merge.write(folder, size, tokenizer))
        read = stored_fingerprint(folder)
        if read != fingerprint:
            raise WorkFailed(
                f"{folder}: the written weights have fingerprint {read}, expected {fingerprint}; not kept."
            )
        kept = ready.noted(fingerprint)
        (folder / RECIPE).write_text(kept.to_yaml(), encoding="utf-8")
        if card:
            (folder / "README.md").write_text(model_card(kept, fingerprint, ready.verdict), encoding="utf-8")
    return fingerprint, checked


def _mismatch(where: str, recorded: str, fingerprint: str, provenance: Provenance) -> str:
    now = versions()
    changed = [f"{name} {was} → {now.get(name)}" for name, was in provenance.versions.items() if now.get(name) != was]
    cause = f"versions changed: {', '.join(changed)}" if changed else "a source model or a parameter has changed"
    return (
        f"{where}: the merge has fingerprint {fingerprint}, but {recorded} was scored ({cause}); nothing was written."
    )
