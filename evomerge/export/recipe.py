"""The recipe of a candidate as it is shared.

Model references become paths that mergekit can read. `evomerge.aliases` keeps the references, so that the recipe can be
merged again on another machine.
"""

import tempfile
from pathlib import Path

from evomerge.archive.archive import Record
from evomerge.errors import InputError
from evomerge.evidence.comparison import against, sentence
from evomerge.evidence.table import heldout_table
from evomerge.files import STATISTICS, write_text
from evomerge.merging.sources.models import Models
from evomerge.merging.sources.references import split_adapter
from evomerge.merging.sources.statistics import shelf_of
from evomerge.merging.vocabulary import with_tokens
from evomerge.recipe import MeasuredOn, Recipe
from evomerge.search.results import Results


def shared_recipe(record: Record, results: Results, models: Models, statistics: Path | None = None) -> Recipe:
    """A candidate's recipe with paths for references, and with dtype, fingerprint, scores and versions.

    An adapter becomes `MODEL+ADAPTER`, here and in the aliases, which mergekit can read.

    record: the candidate's.
    results: the search's.
    models: the models of the search.
    statistics: the run's folder of statistics.
    """
    recipe, archive, config = record.candidate.recipe, results.archive, results.config
    recipe = with_tokens(recipe, config, models)
    named = dict.fromkeys([*recipe.references, *([config.base] if recipe.tokenizer else [])])
    paths = {reference: str(models[reference].source) for reference in named}
    alone = {reference for reference in paths if models[reference].source.adapter and not split_adapter(reference)[1]}
    whole = {reference: f"{config.base}+{reference}" if reference in alone else reference for reference in paths}
    heldout = archive.find(record.candidate.id, "heldout")
    aligned = {config.models[name]: own for name, own in archive.aligned.items()}
    provenance = recipe.evomerge.model_copy(
        update={
            "candidate": record.candidate.id,
            "fingerprint": record.evaluation.fingerprint,
            "scores": _scores(record),
            "quantized": record.evaluation.quantize,
            "heldout": _scores(heldout) if heldout else None,
            "table": heldout_table(results, record.candidate.id),
            "aliases": {
                path: whole[reference]
                for reference, path in paths.items()
                if path != whole[reference] and reference not in aligned
            },
            "aligned": {path: aligned[reference] for reference, path in paths.items() if reference in aligned},
            "versions": dict(archive.recorded_versions()),
            "seen": archive.seen,
            "head_apart": models.head_apart,
            "statistics": _statistics(recipe, results, statistics),
            "verdicts": tuple(map(sentence, against(results, [record.candidate.id])[record.candidate.id])),
        }
    )
    noted = recipe.model_copy(update={"dtype": config.evaluation.dtype, "evomerge": provenance})
    return noted.renamed(paths)


def _statistics(recipe: Recipe, results: Results, folder: Path | None) -> MeasuredOn | None:
    """The statistics that a recipe of a search was merged with; None where its method needs none."""
    recorded = results.archive.statistics
    if not recorded:
        return None
    from evomerge.merging import methods
    from evomerge.merging.methods.base import needed

    method = methods.get(recipe.merge_method, "merge_method")
    names: dict[str, dict[str, str]] = {}
    for kind, reference in needed(method, recipe.base_model, recipe.references):
        name = recorded.get(reference, {}).get(kind)
        if name is not None:
            names.setdefault(reference, {})[kind] = name
    return MeasuredOn(folder=str(folder.absolute()) if folder is not None else None, names=names) if names else None


def _scores(record: Record) -> dict[str, float | None] | None:
    return dict(record.evaluation.scores) if record.evaluation.scores is not None else None


def lost_statistics(recipe: Recipe, path: Path, run: Path) -> str | None:
    """A warning where a recipe needs statistics that its run no longer has; None where all are there.

    recipe: the recipe.
    path: its file.
    run: the run's directory.
    """
    missing = shelf_of(recipe, str(path)).missing
    if not missing:
        return None
    return (
        f"the recipe needs {' and '.join(missing)}, which {run / STATISTICS} lacks; measure it again with "
        f"`evomerge resume {run}`."
    )


def write_recipe(recipe: Recipe, path: Path, evomerge_only: bool = False) -> None:
    """Writes a recipe to a file, whole or not at all.

    recipe: the recipe.
    path: the file; missing folders are made.
    evomerge_only: whether it may be a recipe that only evomerge runs, in memory.
    Raises InputError where it cannot be written, and for layers side by side unless `evomerge_only`: mergekit would not
    refuse them, but run them one after the other.
    """
    if recipe.evomerge.parallel and not evomerge_only:
        start, end = recipe.evomerge.parallel[0]
        raise InputError(
            f"{path}: the candidate runs layers {start} to {end - 1} side by side, which no architecture of "
            "transformers does, so that no checkpoint can hold it, and mergekit would run them one after the other; "
            "choose another candidate, or give --evomerge-only for a recipe that only `evomerge evaluate` takes."
        )
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give -o the name of a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another -o.") from None
    write_text(path, recipe.to_yaml())
