"""Candidates of a run, as programs and notebooks use them."""

import warnings
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.archive.archive import Record
from evomerge.errors import InputError, WorkFailed, choices
from evomerge.export.recipe import lost_statistics, shared_recipe, write_recipe
from evomerge.files import STATISTICS
from evomerge.library.notebook import table_html
from evomerge.recipe import Recipe
from evomerge.reports import views
from evomerge.reports.page.recipes import Picture, picture
from evomerge.runs.journal import OpenRun

if TYPE_CHECKING:
    from pandas import DataFrame


class RunCandidate:
    """A candidate of a run, with what it scored.

    id: its name in the run.
    """

    def __init__(self, run: OpenRun, record: Record, view: views.CandidateView) -> None:
        """run: the run.
        record: the candidate's, on search items.
        view: the candidate with all of its scores.
        """
        self._run, self._record, self._view = run, record, view
        self.id = view.id

    def __repr__(self) -> str:
        mean = "" if self._view.mean is None else f", mean {self._view.mean:.3f} on search items"
        return f"<candidate {self.id}{mean}>"

    def _repr_html_(self) -> str:
        view = self._view
        splits = (
            ("search", view.scores, view.mean),
            ("selection", view.selection, view.selection_mean),
            ("held-out", view.heldout, view.heldout_mean),
        )
        shown = [(split, scores, mean) for split, scores, mean in splits if scores is not None]
        return f"<p>{escape(self.id)}</p>{table_html(shown, self._run.results.criteria().mean_name)}"

    @property
    def recipe(self) -> Recipe:
        """The recipe to share, as `evomerge export` writes it."""
        run = self._run
        return shared_recipe(self._record, run.results, run.prepared.models, run.directory / STATISTICS)

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the weights; None where the candidate failed before they were merged."""
        return self._view.fingerprint

    @property
    def scores(self) -> dict[str, float] | None:
        """The scores on search items by objective; None where the candidate failed."""
        return self._view.scores

    @property
    def selection(self) -> dict[str, float] | None:
        """The scores on selection items; None where it has none."""
        return self._view.selection

    @property
    def heldout(self) -> dict[str, float] | None:
        """The scores on held-out items; None where it has none."""
        return self._view.heldout

    @property
    def genes(self) -> dict[str, float | int | str] | None:
        """The values of the genes by name; None for a control that is no point of the space."""
        return self._view.genes

    def weights(self, parameter: str = "weight") -> "DataFrame":
        """A parameter of the merge by layer and model: a row for each place (embeddings, layers, head), a column for
        each model, or for each model and kind of tensor where kinds differ.

        parameter: such as `weight` or `density`.
        Raises InputError where the candidate merges no weights or the method has no such parameter.
        """
        from pandas import DataFrame, Index, MultiIndex

        grids = self._picture.grids
        if parameter not in grids:
            there = choices(parameter, grids) if grids else "it takes its layers unchanged; see `path`"
            raise InputError(f"{self.id} has no {parameter}; {there}.")
        grid = grids[parameter]
        models = [model for model, _ in grid.rows]
        plain = len(set(models)) == len(models)
        columns = Index(models, name="model") if plain else MultiIndex.from_tuples(grid.rows, names=["model", "tensor"])
        return DataFrame(list(zip(*grid.values, strict=True)), index=Index(grid.columns, name="layer"), columns=columns)

    def path(self) -> "DataFrame":
        """The layers in their order: the model that a layer comes from (`merge` for several), its number there and its
        scale.

        Raises InputError in a space that leaves layers where they are.
        """
        from pandas import DataFrame

        found = self._picture.path
        if found is None:
            raise InputError(f"{self.id}: this search leaves the layers where they are; see `weights`.")
        return DataFrame(
            [(stop.lane, stop.layer, stop.scale) for stop in found.stops], columns=["model", "layer", "scale"]
        )

    @property
    def _picture(self) -> Picture:
        return picture(self._record.candidate.recipe, self._run.config, self._run.prepared.models)

    def load(self, device: str = "cpu") -> Any:
        """The transformers model, merged in memory, with exactly the weights that were scored.

        device: where it is merged and stays.
        Raises WorkFailed where the weights are not those that were scored, and InputError for a failed candidate.
        """
        from evomerge.devices import resolve_device
        from evomerge.merging import vocabulary
        from evomerge.merging.resident.models import ResidentModels

        if self.fingerprint is None:
            raise InputError(f"{self.id} failed ({self._view.error}), so it has no weights; choose another candidate.")
        there = resolve_device(device, "device")
        statistics, dtype = self._run.statistics, self._run.config.evaluation.dtype
        found = []
        for models in self._run.prepared.models.readings():
            tokens = vocabulary.of_search(self._run.config, models)
            finder = statistics.finder(models)
            resident = ResidentModels(models, there, dtype, statistics=finder, vocabulary=tokens)
            found.append(resident.materialize(self._record.candidate.recipe))
            if found[-1] == self.fingerprint:
                return resident.candidate
        raise WorkFailed(
            f"{self.id}: the merge has fingerprint {found[0]}, but {self.fingerprint} was scored; a source model or a "
            "version has changed."
        )

    def export(self, path: str | Path, evomerge_only: bool = False) -> Path:
        """Writes the recipe to a file and returns its path.

        evomerge_only: whether it may be a recipe that only evomerge runs: layers side by side.
        Raises InputError where it cannot be written. Warns where the run has lost statistics that the recipe needs.
        """
        recipe = self.recipe
        write_recipe(recipe, Path(path), evomerge_only)
        if (lost := lost_statistics(recipe, Path(path), self._run.directory)) is not None:
            warnings.warn(lost, stacklevel=2)
        return Path(path)
