"""Writes a recipe's merge as a checkpoint, and keeps it only where its fingerprint is the one that was scored."""

from collections.abc import Callable, Mapping
from pathlib import Path

from evomerge.devices import resolve_dtype
from evomerge.errors import WorkFailed
from evomerge.export.card import model_card
from evomerge.export.licenses import combined, stated_license
from evomerge.export.names import public_names
from evomerge.merging.sources.located import located
from evomerge.merging.sources.models import Models, find_models
from evomerge.merging.sources.preflight import preflight
from evomerge.merging.sources.statistics import shelf_of
from evomerge.merging.sources.tensor_files import torch_dtypes
from evomerge.merging.sources.weights import RECIPE
from evomerge.recipe import Provenance, Recipe
from evomerge.seen import encoded
from evomerge.versions import versions


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
    statistics: a folder of statistics, for methods that need some; those of the recipe's run and those beside the
        recipe are looked at, too.
    warn: is told what the user should know.
    Raises InputError for a recipe or folder that cannot be used, and WorkFailed, leaving nothing, where the recipe
    records another fingerprint than the merge has.
    """
    import torch

    from evomerge.merging.streamed.merge import StreamedMerge, stored_fingerprint
    from evomerge.merging.streamed.shards import check_writable, parse_size, staged

    check_writable(out)
    recipe = located(recipe)
    models = find_models(recipe.references[0], recipe.references)
    for warning in preflight(models, same_tensors=False):
        warn(warning)
    dtype = recipe.out_dtype or recipe.dtype or resolve_dtype("auto", torch_dtypes(models.base.table))
    size = parse_size(shard_size, getattr(torch, dtype).itemsize)
    shelf = shelf_of(recipe, where, statistics)
    merged = StreamedMerge(recipe, models, where, device, dtype, shelf.finder(models))
    if merged.unknown_tokens:
        shown = ", ".join(merged.unknown_tokens[:8])
        warn(f"{where}: no model has an embedding for {shown}; zeros are taken (tokenizer.tokens can name a source).")
    verdict = combined(licenses(models, public_names(recipe)))
    for warning in verdict.warnings:
        warn(warning)
    with staged(out) as folder:
        fingerprint = merged.write(folder, size, tokenizer)
        recorded = recipe.evomerge.fingerprint
        for reading in list(models.readings())[1:] if recorded not in (None, fingerprint) else []:
            earlier = StreamedMerge(recipe, reading, where, device, dtype).write(folder, size, tokenizer)
            fingerprint = earlier if earlier == recorded else fingerprint
        checked = check_fingerprint(recipe, fingerprint, where)
        read = stored_fingerprint(folder)
        if read != fingerprint:
            raise WorkFailed(
                f"{folder}: the written weights have fingerprint {read}, expected {fingerprint}; not kept."
            )
        kept = noted(recipe, fingerprint, models)
        (folder / RECIPE).write_text(kept.to_yaml(), encoding="utf-8")
        if card:
            (folder / "README.md").write_text(model_card(kept, fingerprint, verdict), encoding="utf-8")
    return fingerprint, checked


def check_fingerprint(recipe: Recipe, fingerprint: str, where: str) -> bool:
    """Whether a recipe recorded the fingerprint of its merge.

    recipe: the merge's.
    fingerprint: that of the merged weights.
    where: the recipe's file, for messages.
    Raises WorkFailed where it recorded another one.
    """
    recorded = recipe.evomerge.fingerprint
    if recorded is not None and fingerprint != recorded:
        raise WorkFailed(_mismatch(where, recorded, fingerprint, recipe.evomerge))
    return recorded is not None


def noted(recipe: Recipe, fingerprint: str, models: Models) -> Recipe:
    """The recipe as it lies beside the weights: with their fingerprint, and all items that a search saw on the way.

    recipe: the merge's.
    fingerprint: that of the merged weights.
    models: those of the merge.
    """
    seen = recipe.evomerge.digests | models.seen
    noted = {"fingerprint": fingerprint, "seen": encoded(seen) if seen else None}
    return recipe.model_copy(update={"evomerge": recipe.evomerge.model_copy(update=noted)})


def licenses(models: Models, names: Mapping[str, str]) -> dict[str, str | None]:
    """The license that the card of each parent states, by the parent's name on the merge's card.

    models: the parents.
    names: their names on the card, by reference.
    """
    return {names.get(reference, reference): stated_license(model.folders) for reference, model in models.items()}


def _mismatch(where: str, recorded: str, fingerprint: str, provenance: Provenance) -> str:
    now = versions()
    changed = [f"{name} {was} → {now.get(name)}" for name, was in provenance.versions.items() if now.get(name) != was]
    cause = f"versions changed: {', '.join(changed)}" if changed else "a source model or a parameter has changed"
    return (
        f"{where}: the merge has fingerprint {fingerprint}, but {recorded} was scored ({cause}); nothing was written."
    )
