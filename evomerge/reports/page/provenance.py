"""Where a run comes from and how its winner is made again."""

from dataclasses import dataclass

from evomerge.archive.archive import Record
from evomerge.errors import EvomergeError
from evomerge.export.choice import warnings
from evomerge.export.licenses import combined, stated_license
from evomerge.export.recipe import shared_recipe
from evomerge.files import STATISTICS
from evomerge.runs.journal import OpenRun


@dataclass(frozen=True, slots=True)
class Source:
    """A model that was merged.

    name: its name in the search file, or `base`.
    reference: what the search file calls it.
    identity: 16 hexadecimal digits that change when its files do; None where the files cannot be read.
    license: what its card states; None where it states none.
    """

    name: str
    reference: str
    identity: str | None
    license: str | None


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a run comes from.

    versions: the versions that the search began with, by package.
    format: the format of the run.
    seed: the search's.
    sources: the models.
    license: the hub's id of the license that a merge of the models carries.
    license_warnings: what the license does not say.
    search: the search file, resolved, without the place of its storage.
    """

    versions: dict[str, str]
    format: int
    seed: int
    sources: tuple[Source, ...]
    license: str
    license_warnings: tuple[str, ...]
    search: str


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What makes a candidate again.

    candidate: its id.
    fingerprint: of its weights.
    recipe: its recipe as YAML.
    warnings: what to know before it ships.
    parallel: whether it runs layers side by side, so that no checkpoint can hold it.
    """

    candidate: str
    fingerprint: str | None
    recipe: str
    warnings: tuple[str, ...]
    parallel: bool = False


def provenance(run: OpenRun) -> Provenance:
    """Where a run comes from."""
    config = run.config
    sources = [Source("base", config.base, *_read(run, config.base))]
    sources += [Source(name, reference, *_read(run, reference)) for name, reference in config.models.items()]
    verdict = combined({source.name: source.license for source in sources})
    return Provenance(
        dict(run.archive.recorded_versions()),
        run.archive.format,
        config.seed,
        tuple(sources),
        verdict.license,
        tuple(verdict.warnings),
        config.model_copy(update={"storage": None}).to_yaml(),
    )


def _read(run: OpenRun, reference: str) -> tuple[str | None, str | None]:
    model = run.prepared.models[reference]
    try:
        return model.identity, stated_license(model.folders)
    except (OSError, EvomergeError):
        return None, None


def rebuilt(run: OpenRun, record: Record) -> Rebuilt:
    """What makes a candidate again.

    run: the run.
    record: the candidate's.
    """
    recipe = shared_recipe(record, run.results, run.prepared.models, run.directory / STATISTICS)
    told = tuple(warnings(record, run.results))
    return Rebuilt(
        record.candidate.id, record.evaluation.fingerprint, recipe.to_yaml(), told, bool(recipe.evomerge.parallel)
    )
