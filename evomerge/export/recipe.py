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
from evomerge.files import write_text
from evomerge.merging.sources.models import Models
from evomerge.merging.sources.references import split_adapter
from evomerge.recipe import Recipe
from evomerge.search.results import Results


def shared_recipe(record: Record, results: Results, models: Models) -> Recipe:
    """A candidate's recipe with paths for references, and with dtype, fingerprint, scores and versions.

    An adapter becomes `MODEL+ADAPTER`, here and in the aliases, which mergekit can read.

    record: the candidate's.
    results: the search's.
    models: the models of the search.
    """
    recipe, archive, config = record.candidate.recipe, results.archive, results.config
    paths = {reference: str(models[reference].source) for reference in recipe.references}
    alone = {reference for reference in paths if models[reference].source.adapter and not split_adapter(reference)[1]}
    whole = {reference: f"{config.base}+{reference}" if reference in alone else reference for reference in paths}
    heldout = archive.find(record.candidate.id, "heldout")
    provenance = recipe.evomerge.model_copy(
        update={
            "candidate": record.candidate.id,
            "fingerprint": record.evaluation.fingerprint,
            "scores": _scores(record),
            "quantized": record.evaluation.quantize,
            "heldout": _scores(heldout) if heldout else None,
            "table": heldout_table(results, record.candidate.id),
            "aliases": {path: whole[reference] for reference, path in paths.items() if path != whole[reference]},
            "versions": dict(archive.recorded_versions()),
            "seen": archive.seen,
            "head_apart": models.head_apart,
            "verdicts": tuple(map(sentence, against(results, [record.candidate.id])[record.candidate.id])),
        }
    )
    renamed = recipe.renamed(paths)
    return renamed.model_copy(update={"dtype": config.evaluation.dtype, "evomerge": provenance})


def _scores(record: Record) -> dict[str, float | None] | None:
    return dict(record.evaluation.scores) if record.evaluation.scores is not None else None


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Writes a recipe to a file, whole or not at all.

    recipe: the recipe.
    path: the file; missing folders are made.
    Raises InputError where it cannot be written.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give -o the name of a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another -o.") from None
    write_text(path, recipe.to_yaml())
