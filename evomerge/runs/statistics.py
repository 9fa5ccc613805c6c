"""Statistics of a search's models, measured by hand into a folder."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import cast

from evomerge.errors import InputError, choices, naming
from evomerge.events import Listener, Warned, WorkersAwaited, WorkersReady
from evomerge.files import check_writable
from evomerge.merging.methods.base import JOINT, Kind
from evomerge.merging.sources.statistics import WORDS
from evomerge.search.preparation import prepare_file, without_gradient
from evomerge.search.statistics import Names, measure, wanted
from evomerge.workers.pools import make_pool
from evomerge.workers.ray_address import given


def measure_file(
    search_file: Path,
    folder: Path,
    kinds: Sequence[str] | None,
    overrides: Sequence[str],
    address: str | None,
    listener: Listener,
) -> Names:
    """The names of the folders with statistics, by the model's reference and the kind. What is there is kept.

    search_file: says of which models, and on which items.
    folder: the folder to write into.
    kinds: the kinds of statistics; by default those that the search's methods need.
    overrides: settings that replace those of the file, as KEY=VALUE.
    address: a Ray cluster's; None for this machine.
    listener: is told of each.
    Raises InputError for mistakes in the file, and where nothing is asked for.
    """
    from evomerge.evaluation.loading import of_metrics

    for kind in kinds or ():
        if kind not in WORDS:
            raise InputError(f"--kind is {kind}; {choices(kind, WORDS)}.")
    prepared = prepare_file(search_file, overrides, given(address))
    config = prepared.config
    unaligned = [name for name, own in config.align.items() if own.folder is None]
    if unaligned:
        with naming(search_file):
            raise InputError(
                f"align.{unaligned[0]} stands for a model that a run makes, and which then has other statistics; "
                "measure it with the search file in the run's directory."
            )
    if "row_weights" in (kinds or ()):
        hindrance = without_gradient(config, prepared.models, of_metrics(config.measured, prepared.targets or {}))
        if hindrance is not None:
            with naming(search_file):
                raise InputError(f"weights of rows follow gradients, but {hindrance}; measure another --kind.")
    pairs = wanted(config)
    if kinds:
        models = {kind: [config.base, *config.models.values()] for kind in kinds}
        models |= {kind: list(config.models.values()) for kind in kinds if kind in JOINT}
        pairs = [(cast(Kind, kind), reference) for kind, references in models.items() for reference in references]
    if not pairs:
        with naming(search_file):
            raise InputError("no method in space.method needs statistics; say which to measure with --kind.")
    check_writable(folder)
    for warning in prepared.warnings:
        listener(Warned(warning))
    listener(WorkersAwaited())
    with closing(make_pool(config, prepared.models, prepared.targets, address, folder)) as pool:
        listener(WorkersReady(pool.size, config.workers.pool))
        return measure(pairs, pool, listener)
