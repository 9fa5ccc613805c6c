"""Export: the recipe of a candidate as people share it, and a recipe's merge as a checkpoint.

Model references become paths that mergekit can read; `evomerge.aliases` keeps what they stood for, so that the recipe
can be merged again on another machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from evomerge.archive import Archive, Record, versions
from evomerge.card import model_card
from evomerge.config import SearchConfig, Split
from evomerge.criteria import Criteria, criteria_of
from evomerge.errors import InputError, WorkFailed, choices
from evomerge.evidence import against, sentence
from evomerge.failures import counted
from evomerge.licenses import combined, stated_license
from evomerge.merging.plan import unread_parameters
from evomerge.merging.sources import (
    RECIPE,
    Weights,
    find_source,
    preflight,
    seen_by,
    split_adapter,
    tensor_table,
)
from evomerge.preparation import resolve_dtype
from evomerge.recipe import Provenance, Recipe, single
from evomerge.search import best_found, best_of, front_of, means
from evomerge.seen import encoded

_REASONS = 3  # for which candidates failed, that a sentence tells


def choose(archive: Archive, config: SearchConfig, candidate: str | None, prefer: Sequence[str]) -> Record:
    """The record to export: by id, by preference over the front, or the best found.

    Raises WorkFailed where no candidate keeps to the search's constraints.
    """
    records = archive.records()
    if candidate is not None and prefer:
        raise InputError(f"--candidate {candidate} and --prefer {prefer[0]} were both given; give one of them.")
    if candidate is not None:
        return _by_id(records, criteria_of(archive, config), candidate)
    best = _preferred(records, archive, config, prefer) if prefer else best_found(archive, config)
    if best is None and all(record.evaluation.failed for record in records):
        raise InputError("the archive holds no successful evaluation yet, so there is nothing to export.")
    failed = all_failed(archive)
    if failed is not None:
        raise WorkFailed(f"{failed}, so there is nothing to export; --candidate names a control if you want one.")
    if best is None:
        raise WorkFailed(none_feasible(archive, config))
    return best


def all_failed(archive: Archive) -> str | None:
    """A clause for a search of which every candidate failed, with the commonest reasons; None for any other."""
    searched = [record.evaluation for record in archive.tried() if record.candidate.kind == "search"]
    if not searched or not all(evaluation.failed for evaluation in searched):
        return None
    reasons = list(counted(searched).items())
    told = "; ".join(f"{count} x {reason.rstrip('.')}" for reason, count in reasons[:_REASONS])
    more = sum(count for _, count in reasons[_REASONS:])
    return f"all {len(searched)} candidates failed ({told}{f'; {more} for other reasons' if more else ''})"


def none_feasible(archive: Archive, config: SearchConfig) -> str:
    """A sentence for a search in which no candidate keeps to the constraints: what they ask, and who came closest."""
    selected = best_of(archive.records(), criteria_of(archive, config)) is not None
    split: Split = "selection" if selected else "search"  # those who keep to them on search items break them there
    criteria = criteria_of(archive, config, split)
    asked = " and ".join(str(limit) for limit in criteria.limits)
    records = [record for record in archive.records(split) if not record.evaluation.failed]
    totals = criteria.violations([record.evaluation for record in records]).sum(axis=1)
    closest = records[int(np.argmin(totals))]
    scores = closest.evaluation.scores or {}
    reached = ", ".join(f"{name} {scores[name]:.3f}" for name in dict.fromkeys(limit.name for limit in criteria.limits))
    return (
        f"no candidate keeps to the constraints on {split} items: {asked}; {closest.candidate.id} comes closest with "
        f"{reached}, so there is nothing to export; search longer, or ask for less."
    )


def _by_id(records: Sequence[Record], criteria: Criteria, candidate: str) -> Record:
    found = {record.candidate.id: record for record in records}
    if candidate not in found:
        shown = choices(candidate, found) if len(found) <= 12 else "`evomerge candidates` lists them"
        raise InputError(f"--candidate {candidate}: no such candidate in this run; {shown}.")
    if found[candidate].evaluation.failed:
        raise InputError(f"--candidate {candidate} failed ({found[candidate].evaluation.error}); choose another.")
    broken = [
        f"{limit}, while it reaches {scores[limit.name]:.3f}"
        for limit in criteria.limits
        if (scores := found[candidate].evaluation.scores) is not None and limit.violation(found[candidate].evaluation)
    ]
    if broken:
        raise InputError(f"--candidate {candidate} breaks a constraint ({broken[0]}); choose another.")
    return found[candidate]


def _preferred(
    records: Sequence[Record], archive: Archive, config: SearchConfig, prefer: Sequence[str]
) -> Record | None:
    weights = _preferences(config, prefer)
    objectives = tuple(
        objective.model_copy(update={"weight": weights[objective.name]})
        for objective in config.objectives
        if weights.get(objective.name, 0) > 0
    )
    criteria = criteria_of(archive, config)
    return best_of(front_of(records, criteria), replace(criteria, objectives=objectives))


def _preferences(config: SearchConfig, prefer: Sequence[str]) -> dict[str, float]:
    names = [objective.name for objective in config.objectives]
    weights = {}
    for text in prefer:
        name, _, value = text.rpartition("=")
        if name not in names:
            raise InputError(f"--prefer {text}: expected OBJECTIVE=WEIGHT; {choices(name or text, names)}.")
        try:
            weights[name] = float(value)
        except ValueError:
            raise InputError(f"--prefer {text}: the weight '{value}' is no number.") from None
        if not 0 <= weights[name] < float("inf"):
            raise InputError(f"--prefer {text}: use a weight of at least 0.")
    if not any(weights.values()):
        raise InputError("--prefer: every weight is 0; give at least one objective a positive weight.")
    return weights


def shared_recipe(record: Record, archive: Archive, config: SearchConfig) -> Recipe:
    """A candidate's recipe with paths for references, dtype, fingerprint, scores and versions.

    An adapter becomes `MODEL+ADAPTER`, which mergekit reads too, here and in the aliases.
    """
    recipe = record.candidate.recipe
    sources = {reference: find_source(reference, config.base) for reference in recipe.references}
    paths = {reference: str(source) for reference, source in sources.items()}
    whole = {
        reference: f"{config.base}+{reference}" if source.adapter and not split_adapter(reference)[1] else reference
        for reference, source in sources.items()
    }
    heldout = archive.find(record.candidate.id, "heldout")
    provenance = recipe.evomerge.model_copy(
        update={
            "candidate": record.candidate.id,
            "fingerprint": record.evaluation.fingerprint,
            "scores": _scores(record),
            "heldout": _scores(heldout) if heldout else None,
            "aliases": {path: whole[reference] for reference, path in paths.items() if path != whole[reference]},
            "versions": dict(archive.recorded_versions()),
            "seen": archive.seen,
            "head_apart": head_apart(config),
            "verdicts": tuple(map(sentence, against(archive, config, [record.candidate.id])[record.candidate.id])),
        }
    )
    renamed = recipe.renamed(paths)
    return renamed.model_copy(update={"dtype": config.evaluation.dtype, "evomerge": provenance})


def head_apart(config: SearchConfig) -> bool:
    """Whether some models of a search tie their head to the embedding and others do not: in memory it is then a tensor
    of its own, also where a recipe names only models that tie it."""
    references = (config.base, *config.models.values())
    heads = [Weights(find_source(reference, config.base)).own_head for reference in references]
    return None in heads and any(heads)


def _scores(record: Record) -> dict[str, float | None] | None:
    return dict(record.evaluation.scores) if record.evaluation.scores is not None else None


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Writes a recipe, whole or not at all."""
    from evomerge.runs import write_text

    if path.is_dir():
        raise InputError(f"{path}: is a folder; give -o the name of a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, recipe.to_yaml())
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another -o.") from None


def warnings(record: Record, archive: Archive, config: SearchConfig) -> list[str]:
    """What a user should know before shipping a candidate: a control that is as good on what has been measured, or from
    which held-out items do not tell it apart."""
    found = []
    if record.candidate.kind == "control":
        what = (
            "a merge that the search had to beat"
            if len(record.candidate.recipe.references) > 1
            else "a model unchanged"
        )
        found.append(f"{record.candidate.id} is a control, {what}, and no candidate of the search.")
    splits: dict[Split, str] = {"search": "search", "heldout": "held-out"}
    for split, items in splits.items():
        records = archive.records(split)
        mine = archive.find(record.candidate.id, split)
        criteria = criteria_of(archive, config, split)
        rival = best_of([other for other in records if other.candidate.kind == "control"], criteria)
        if mine is None or rival is None or rival.candidate.id == record.candidate.id:
            continue
        own, theirs = means([mine, rival], criteria)
        if theirs >= own:
            scores = "scores" if not criteria.scales else f"has a {criteria.mean_name} of"
            found.append(
                f"the control {rival.candidate.id} {scores} {theirs:.3f} on {items} items, this one {own:.3f}."
            )
    for row in against(archive, config, [record.candidate.id])[record.candidate.id]:
        if row["verdict"] != "better":
            found.append(f"{sentence(row)}.")
    return found


def located(recipe: Recipe) -> Recipe:
    """A recipe whose missing paths are replaced by what they stood for where it was exported."""
    aliases = recipe.evomerge.aliases
    missing = {path: aliases[path] for path in recipe.references if path in aliases and not _is_here(path)}
    return recipe.renamed(missing)


def _is_here(path: str) -> bool:
    model, adapter = split_adapter(path)
    return Path(model).exists() and (adapter is None or Path(adapter).exists())


def merge(
    recipe: Recipe,
    out: Path,
    where: str,
    device: str = "cpu",
    *,
    shard_size: str = "5GB",
    tokenizer: bool = True,
    card: bool = True,
    warn: Callable[[str], None] = lambda _: None,
) -> tuple[str, bool]:
    """Writes a recipe's checkpoint. Returns its fingerprint and whether the recipe recorded the same one.

    shard_size: of a file of weights, as in 5GB (bytes) or 5B (parameters). warn: is told what the user should know.
    Raises WorkFailed, leaving nothing, where the recipe records another fingerprint than the merge has.
    """
    import torch

    from evomerge.merging.checkpoint import check_writable, parse_size, staged
    from evomerge.merging.stream import StreamedMerge, stored_fingerprint

    check_writable(out)
    recipe = located(recipe)
    skeleton = recipe.references[0]
    for warning in preflight(skeleton, {each: each for each in recipe.references[1:]}, same_tensors=False):
        warn(warning)
    dtype = recipe.out_dtype or recipe.dtype or resolve_dtype("auto", tensor_table(find_source(skeleton, skeleton)))
    size = parse_size(shard_size, getattr(torch, dtype).itemsize)
    merged = StreamedMerge(recipe, where, device, dtype)
    if merged.unknown_tokens:
        shown = ", ".join(merged.unknown_tokens[:8])
        warn(f"{where}: no model has an embedding for {shown}; zeros are taken (tokenizer.tokens can name a source).")
    verdict = combined(_licenses(recipe))
    for warning in verdict.warnings:
        warn(warning)
    recorded = recipe.evomerge.fingerprint
    with staged(out) as folder:
        found = merged.write(folder, size, tokenizer)
        if recorded is not None and found != recorded:
            raise WorkFailed(_mismatch(where, recorded, found, recipe.evomerge))
        read = stored_fingerprint(folder)
        if read != found:
            raise WorkFailed(f"{folder}: the written weights have fingerprint {read}, expected {found}; not kept.")
        seen = recipe.evomerge.digests.union(*(seen_by(find_source(each, skeleton)) for each in recipe.references))
        noted = {"fingerprint": found, "seen": encoded(seen) if seen else None}
        kept = recipe.model_copy(update={"evomerge": recipe.evomerge.model_copy(update=noted)})
        (folder / RECIPE).write_text(kept.to_yaml(), encoding="utf-8")
        if card:
            (folder / "README.md").write_text(model_card(kept, found, verdict), encoding="utf-8")
    return found, recorded is not None


def _licenses(recipe: Recipe) -> dict[str, str | None]:
    """What the card of each parent states, by the name that the merge's card calls it."""
    aliases, found = recipe.evomerge.aliases, {}
    for reference in recipe.references:
        source = find_source(reference, recipe.references[0])
        folders = [source.folder] if source.adapter is None else [source.folder, source.adapter]
        found[aliases.get(reference, reference)] = stated_license(folders)
    return found


def _mismatch(where: str, recorded: str, found: str, provenance: Provenance) -> str:
    now = versions()
    changed = [f"{name} {was} → {now.get(name)}" for name, was in provenance.versions.items() if now.get(name) != was]
    cause = f"versions changed: {', '.join(changed)}" if changed else "a source model or a parameter has changed"
    return f"{where}: the merge has fingerprint {found}, but {recorded} was scored ({cause}); nothing was written."


def read(target: str, warn: Callable[[str], None] = lambda _: None) -> Recipe:
    """The recipe in a YAML file, or the recipe that is a model unchanged. warn: is told of what a file says in vain."""
    if target.endswith((".yaml", ".yml")):
        return located(load(Path(target), warn))
    return single(target)


def load(path: Path, warn: Callable[[str], None] = lambda _: None) -> Recipe:
    """The recipe in a file. warn: is told of keys and parameters that are ignored."""
    from evomerge import recipe

    found = recipe.load(path, warn)
    for warning in unread_parameters(found):
        warn(f"{path}: {warning}")
    return found
