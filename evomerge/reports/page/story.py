"""A run with all that its page is made of, and the few words at the top of the page."""

from dataclasses import dataclass
from functools import cached_property

from evomerge.archive.archive import Record
from evomerge.evidence.ablation import Ablated, ablated
from evomerge.reports import views
from evomerge.reports.page.course import Costs, Course, costs, course
from evomerge.reports.page.importance import Features, features, importances
from evomerge.reports.page.items import Flips, flips
from evomerge.reports.page.provenance import Provenance, Rebuilt, provenance, rebuilt
from evomerge.reports.page.recipes import Picture, picture
from evomerge.runs.journal import OpenRun
from evomerge.search.results import all_failed

MOST_PICTURES = 12  # candidates of the front whose recipes are drawn


@dataclass(frozen=True)
class Story:
    """A run with all that its page is made of, each part worked out once.

    run: the run.
    running: whether a process is at work on it.
    directory: what the run is called.
    with_items: whether the page has the text of items.
    """

    run: OpenRun
    running: bool
    directory: str
    with_items: bool = False

    @cached_property
    def best(self) -> Record | None:
        """The winner; None while there is none."""
        return self.run.results.best()

    @cached_property
    def winner(self) -> str | None:
        return self.best.candidate.id if self.best is not None else None

    @cached_property
    def rows(self) -> list[views.CandidateView]:
        return views.candidates(self.run.results)

    @cached_property
    def whole(self) -> list[views.CandidateView]:
        """The candidates with scores on all search items that can be compared with each other."""
        quantized = self.run.results.study == "quantized"
        rows = [row for row in self.rows if row.scores is not None and row.subset is None]
        return [row for row in rows if (row.quantize is not None) == quantized]

    @cached_property
    def front(self) -> list[Record]:
        return self.run.results.front()

    @cached_property
    def front_ids(self) -> list[str]:
        return [record.candidate.id for record in self.front]

    @cached_property
    def status(self) -> views.StatusView:
        return views.status(self.run.results, self.running)

    @cached_property
    def evidence(self) -> views.EvidenceView:
        return views.evidence(self.run.results)

    @cached_property
    def objectives(self) -> list[str]:
        return [objective.name for objective in self.run.config.objectives]

    @cached_property
    def costs(self) -> Costs:
        return costs(self.run.results)

    @cached_property
    def course(self) -> Course:
        return course(self.run.results)

    @cached_property
    def features(self) -> Features:
        return features(self.run.results, self.run.prepared.space.genes)

    @cached_property
    def shares(self) -> dict[str, float] | str:
        return importances(self.features)

    @cached_property
    def pictures(self) -> list[tuple[str, Picture]]:
        """The winner's recipe as a picture, and those of the front, by candidate."""
        records = [self.best] if self.best is not None else []
        records += [record for record in self.front if record.candidate.id != self.winner][:MOST_PICTURES]
        made = []
        for record in records:
            recipe = record.candidate.recipe
            made.append((record.candidate.id, picture(recipe, self.run.config, self.run.prepared.models)))
        return made

    @cached_property
    def ablated(self) -> Ablated | None:
        """What was found by putting parts of the winner back; None where it was not asked for."""
        return ablated(self.run.results, self.run.prepared.space)

    @cached_property
    def flips(self) -> list[Flips]:
        return flips(self.run.results, self.winner) if self.winner is not None else []

    @cached_property
    def provenance(self) -> Provenance:
        return provenance(self.run)

    @cached_property
    def rebuilt(self) -> Rebuilt | None:
        return rebuilt(self.run, self.best) if self.best is not None else None


def headline(story: Story) -> str:
    """The most important sentence about a run."""
    compared = story.evidence.against
    if story.winner is None:
        failed = all_failed(story.run.results)
        return f"There is no winner: {failed}." if failed else "There is no winner yet."
    if story.best is not None and story.best.candidate.kind == "control":
        return f"No candidate of the search can win yet; the best control is {story.winner}."
    if not compared:
        return f"{story.winner} leads on search items; it has no held-out scores yet, so nothing is proven."
    told = [
        f"{one.verdict} {'from' if one.verdict == 'not distinguishable' else 'than'} the {one.role} ({one.rival})"
        for one in compared
    ]
    return f"On items that the search never saw, {story.winner} is {' and '.join(told)}."


def facts(story: Story) -> list[tuple[str, str]]:
    """Short facts about a run, with their titles."""
    status, best = story.status, story.status.best
    mean = None if best is None else best.heldout_mean if best.heldout_mean is not None else best.mean
    split = "held-out" if best is not None and best.heldout_mean is not None else "search"
    return [
        ("state", status.state),
        ("winner", story.winner or "none"),
        (f"{status.mean}, {split} items", "none" if mean is None else f"{mean:.3f}"),
        ("evaluations", f"{status.evaluations:,}"),
        ("forward passes", f"{status.equivalents:,.0f} of {story.run.config.limit:,.0f}"),
        ("on the front", f"{status.front_size:,}"),
        ("failed", str(status.failed)),
    ]
