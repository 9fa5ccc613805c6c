"""The sections of a report, in their order: each turns views of a run into blocks. What cannot be shown says so."""

import math
import shlex
from collections import Counter
from collections.abc import Sequence

from evomerge.errors import EvomergeError
from evomerge.evidence.ablation import Part
from evomerge.evidence.comparison import Kept, phrase
from evomerge.files import SEARCH_FILE
from evomerge.optimizers.make import FORWARD_PASSES
from evomerge.reports import views
from evomerge.reports.page import figures, pictures
from evomerge.reports.page.blocks import Block, Drawing, Section, Table, Text
from evomerge.reports.page.course import Course
from evomerge.reports.page.distances import Distances, distances
from evomerge.reports.page.items import Question, questions, shown_questions
from evomerge.reports.page.recipes import MERGE, Grid, Path, spread
from evomerge.reports.page.story import Story
from evomerge.search.criteria import sign_of

_MOST_CELLS = 40_000  # of all heat maps together
_MOST_AXES = 14  # of parallel coordinates
_FEW = 8  # candidates, of which no course can be read
_MOST_FLIPS = 60  # questions of one rival and metric
_LONGEST = 800  # characters of a question
_MOST_TEXT = 300_000  # characters of all questions together
_MOST_NUMBERS = 2000  # items of one rival and metric whose numbers are listed

QUESTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Which layers matter?", ("ablation", "importances")),
    ("What did the winner lose?", ("retention",)),
    ("Is it luck?", ("verdict",)),
    ("What would more budget bring?", ("course",)),
    ("Which model is useless?", ("ablation", "recipe", "path")),
    ("What did it cost?", ("cost",)),
    ("Can I ship it?", ("shipping",)),
    ("How do I rebuild it?", ("rebuild",)),
    ("How far is it from its parents?", ("distance",)),
    ("Which items flipped?", ("items",)),
)
"""What a newcomer asks, and the ids of the blocks that answer it; the first that has something to show is the best."""


def sections(story: Story) -> list[Section]:
    """The sections of a run's page, in their order."""
    return [
        Section("summary", "Verdict", (_verdict(story), _table(story), _cost(story))),
        Section("candidates", "Candidates", (_front(story), _shrinkage(story))),
        Section("search", "Course of the search", (_course(story), _losses(story))),
        Section("merge", "The recipe as a picture", (_recipe(story), _spread(story), _path(story))),
        Section("genes", "Genes", (_importances(story), _parallel(story))),
        Section("parts", "Parts of the winner", (_ablation(story), _way(story))),
        Section("parents", "Parents and constraints", (_retention(story), _constraints(story), _distance(story))),
        Section("differences", "Items", (_items(story),)),
        Section("provenance", "Provenance", (_shipping(story), _rebuild(story), _origin(story))),
    ]


def answers(made: Sequence[Section]) -> list[tuple[str, str]]:
    """Every question of a newcomer, and the id of the block of a page that answers it, or else says why it cannot.

    made: the sections of the page; a page of something else than a run has no answers.
    """
    by_id = {block.id: block for section in made for block in section.blocks}
    found = []
    for question, names in QUESTIONS:
        known = [by_id[name] for name in names if name in by_id]
        told = [block for block in known if block.drawing is not None or block.tables or block.texts]
        found += [(question, block.id) for block in (told or known[-1:])[:1]]
    return found


# Verdict


def _verdict(story: Story) -> Block:
    compared = story.evidence.against
    title = "Winner against the best parent and the best control"
    if not compared:
        why = "it has no held-out scores yet" if story.winner is not None else "there is no winner"
        return Block("verdict", title, f"The winner cannot be compared on held-out items, since {why}.")
    rows = []
    for one in compared:
        for name, task in one.objectives.items():
            low, high = task.interval
            interval = f"{task.difference:+.3f} ({low:+.3f} to {high:+.3f})"
            rows.append((one.rival, name, interval, f"{task.won} / {task.lost}", _p_value(task.p_value)))
        low, high = one.interval
        mean = f"{one.difference:+.3f} ({low:+.3f} to {high:+.3f})"
        rows.append((one.rival, one.of, mean, "", f"{_p_value(one.corrected)} (corrected)"))
    says = (
        "Each dot is the lead of the winner over a rival on held-out items, which the search never saw; the line is "
        "the 95 % interval. Where the line crosses 0, the lead may be luck."
    )
    head = ("rival", "task", "lead (95 % interval)", "items won / lost", "p-value")
    notes = tuple(f"Against {one.rival}, the {one.role}: {phrase(one)}." for one in compared)
    return Block("verdict", title, says, figures.verdict(compared), (Table(head, rows),), notes)


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _table(story: Story) -> Block:
    title, config = "Scores of the winner and of its controls", story.run.config
    measured = [metric.name for metric in config.measured]
    beside = [metric.name for metric in config.report]
    rows = []
    for name, row in views.comparison(story.run.results):
        scores = row.heldout or {}
        own, more = ([_score(scores.get(metric)) for metric in metrics] for metrics in (measured, beside))
        rows.append((name, *own, _score(row.heldout_mean), *more))
    if not any(cell for row in rows for cell in row[1:]):
        return Block("scores", title, "No candidate has held-out scores yet, so there is no table of them.")
    says = "The scores on held-out items: those of the controls, which every search must beat, and of the winner below."
    if beside:
        says += f" Only reported, so neither searched on nor in the mean: {', '.join(beside)}."
    return Block("scores", title, says, tables=(Table(("", *measured, story.status.mean, *beside), rows),))


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 1e6 else f"{value:.3g}"


def _cost(story: Story) -> Block:
    spent, whole = story.costs.searched, story.costs
    rows = [
        ("candidates evaluated", f"{spent.evaluations:,}"),
        ("steps along gradients", f"{spent.steps:,}"),
        ("forward passes over all search items", f"{spent.passes:,.1f}"),
        ("items read", f"{spent.items:,.0f}"),
        ("controls evaluated besides", f"{whole.controls:,}"),
        ("work of all workers together", _hours(whole.hours)),
    ]
    if story.ablated is not None:
        seconds = story.ablated.seconds / 3600
        rows.append(("parts of the winner scored besides", f"{story.ablated.evaluations:,} ({_hours(seconds)})"))
    says = (
        "What the search has cost. A candidate that is scored on all search items is one forward pass over them; a "
        f"step along a gradient costs {FORWARD_PASSES:g} times the share of the items that it reads. The first four "
        "rows leave controls out."
    )
    if story.status.early:
        says += f" The search ended before its budget was spent, since {story.status.early}."
    return Block("cost", "Cost", says, tables=(Table(("", ""), rows),))


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:.1f} minutes" if hours * 60 >= 1 else f"{hours * 3600:.1f} seconds"


# Candidates


def _front(story: Story) -> Block:
    title = "Front"
    if not story.whole:
        return Block(
            "front", title, "No candidate has been scored on all search items yet, so there is nothing to draw."
        )
    says = (
        "Each mark is a candidate with its scores on search items. Candidates of the front are those that no other "
        "candidate beats on one objective without losing on another. Choose any two objectives; where there are more, "
        "marks of the front may lie behind others."
    )
    minimized = [objective.name for objective in story.run.config.objectives if sign_of(objective) < 0]
    apart = views.off_front(story.run.results)
    notes = [apart] if apart is not None else []
    notes += [f"Smaller is better for {', '.join(minimized)}."] if minimized else []
    if len(story.whole) > figures.MOST_POINTS:
        notes.append(f"Of {len(story.whole):,} candidates, evenly spaced ones are drawn.")
    drawing = figures.front(story.whole, story.front_ids, story.winner, story.objectives)
    return Block("front", title, says, drawing, notes=tuple(notes))


def _shrinkage(story: Story) -> Block:
    rows = [row for row in story.whole if row.heldout is not None]
    title = "Search scores against held-out scores"
    if not rows:
        return Block("shrinkage", title, "No candidate has held-out scores yet, so nothing can be compared.")
    says = (
        "Each mark is a candidate with its score on search items (across) and on held-out items (up). Marks below the "
        "dotted line have lost on new items what they had won by luck, or by learning the search items."
    )
    mine = next((row for row in rows if row.id == story.winner), None)
    notes: tuple[str, ...] = ()
    if mine is not None and mine.mean is not None and mine.heldout_mean is not None:
        notes = (f"The winner has {mine.mean:.3f} on search items and {mine.heldout_mean:.3f} on held-out items.",)
    drawing = figures.shrinkage(rows, story.front_ids, story.winner, story.objectives)
    return Block("shrinkage", title, says, drawing, notes=notes)


# Course


def _course(story: Story) -> Block:
    title = "Best so far"
    shown = story.course
    if not any(point.mean is not None for point in shown.points):
        return Block("course", title, "No candidate of the search has a score yet, so there is no course to draw.")
    says = (
        "The thick line is the best mean so far on search items; each dot is a candidate. Broken lines are controls. "
        "Where the thick line has been flat for long, more budget of the same kind would bring little."
    )
    notes = [f"A thin upright line marks where something begins: {mark.text}." for mark in shown.marks[:6]]
    if story.run.config.optimizer.restarts and story.run.config.optimizer.name == "cma_es":
        notes.append("The archive does not record where CMA-ES starts again, so that is not marked.")
    if len(shown.points) > figures.MOST_POINTS:
        notes.append(f"Of {len(shown.points):,} candidates, evenly spaced ones are drawn.")
    notes += _flat(shown)
    if story.run.config.items.selection is not None and story.winner is not None:
        notes.append(f"The winner is {story.winner}, chosen on selection items among the best of these.")
    controls = [
        (name, row.mean)
        for name, row in views.comparison(story.run.results)
        if row.kind == "control" and row.mean is not None
    ]
    return Block("course", title, says, figures.course(shown, controls), notes=tuple(notes))


def _flat(shown: Course) -> list[str]:
    """A sentence about how long ago the best candidate was found."""
    best = [point.best for point in shown.points]
    if not best or best[-1] is None:
        return []
    last = best.index(best[-1])
    after = len(best) - 1 - last
    found = f"The best mean ({best[-1]:.3f}) was reached by {shown.points[last].id}; {after} candidates came after it."
    half = best[(len(best) - 1) // 2]
    if half is None or len(best) < _FEW:
        return [found, "There are too few candidates to tell what more budget would bring."]
    gained = best[-1] - half
    brings = "may bring more" if gained > 0 else "promises little"
    return [
        found,
        f"The second half of the candidates raised it by {gained:.3f}, so more budget of this kind {brings}.",
    ]


def _losses(story: Story) -> Block:
    title = "Losses along gradients"
    if not story.course.losses:
        return Block("losses", title, "This search has followed no gradients, so there are no losses.")
    says = (
        "The mean loss of each metric on the items of each step along gradients; lower is better. Steps read different "
        "items, so lines jump up and down."
    )
    compared = story.run.config.optimizer.learning.loss == "activations"
    unit = "loss, as a share of the distance between models" if compared else "loss in nats"
    return Block("losses", title, says, figures.losses(story.course.losses, unit))


# Recipe


def _grids(story: Story) -> list[tuple[str, dict[str, Grid]]]:
    """The grids of the winner and of the front, as many as a page holds."""
    found: list[tuple[str, dict[str, Grid]]] = []
    cells = 0
    for name, shown in story.pictures:
        cells += sum(len(grid.rows) * len(grid.columns) for grid in shown.grids.values())
        if shown.grids and (cells <= _MOST_CELLS or not found):
            found.append((name, shown.grids))
    return found


def _recipe(story: Story) -> Block:
    title = "Weights by layer and model"
    found = _grids(story)
    if not found:
        return Block("recipe", title, _no_grids(story))
    says = (
        "Each cell is what the recipe says for a model (rows) in a layer (columns): its weight, its density and what "
        "else the method takes. A model whose weights are near 0 everywhere adds nothing. Choose another candidate of "
        "the front to see what differs. Embeddings and head have one value, which stands in every row of a model."
    )
    titles = [_named(name, story) for name, _ in found]
    drawing = pictures.grids(titles, [grids for _, grids in found], "candidate")
    methods = {name: shown.method for name, shown in story.pictures}
    name = found[0][0]
    notes = (f"{name} is merged by {methods[name]}.", *_useless(found[0]))
    listed = len({name for name, _ in found} & set(story.front_ids))
    if listed < len(story.front):
        notes += (
            f"The list has {listed} of the {len(story.front)} candidates of the front; models that are unchanged have "
            "no weights, and a long front is cut.",
        )
    return Block("recipe", title, says, drawing, notes=notes)


def _named(name: str, story: Story) -> str:
    return f"winner ({name})" if name == story.winner else name


def _no_grids(story: Story) -> str:
    if not story.pictures:
        return "There is no candidate whose recipe could be drawn yet."
    record = story.best if story.best is not None else story.front[0]
    if len(record.candidate.recipe.references) == 1:
        return f"{record.candidate.id} is one model unchanged, so no weights are merged."
    if record.candidate.recipe.merge_method == "passthrough":
        return "This search merges no weights; the path through the layers is drawn below."
    return f"The method {record.candidate.recipe.merge_method} takes no numbers, so there is nothing to draw."


def _useless(found: tuple[str, dict[str, Grid]]) -> list[str]:
    """A sentence about the size of each model's weights in a candidate."""
    name, grids = found
    grid = grids.get("weight")
    if grid is None:
        return []
    sizes: dict[str, list[float]] = {}
    for (model, _), values in zip(grid.rows, grid.values, strict=True):
        sizes.setdefault(model, []).extend(abs(value) for value in values if value is not None)
    means = {model: sum(values) / len(values) for model, values in sizes.items() if values}
    listed = ", ".join(f"{model} {size:.2f}" for model, size in means.items())
    return [f"Mean size of the weights of {name}: {listed}."]


def _spread(story: Story) -> Block:
    title = "Spread over the front"
    found = [shown.grids for _, shown in story.pictures if shown.grids]
    if len(found) < 2:
        return Block(
            "spread", title, "There are fewer than two recipes with numbers on the front, so they do not differ."
        )
    names = list(dict.fromkeys(name for grids in found for name in grids))
    both = {name: spread([grids[name] for grids in found if name in grids]) for name in names}
    says = (
        f"The standard deviation and the mean of each cell over {len(found)} candidates of the front. Where the "
        "deviation is large, candidates that are equally good differ there, so that layer decides between objectives "
        "or does not matter."
    )
    drawing = pictures.grids(
        ("standard deviation", "mean"),
        ({name: pair[1] for name, pair in both.items()}, {name: pair[0] for name, pair in both.items()}),
        "show",
        alike=False,
    )
    return Block("spread", title, says, drawing)


def _path(story: Story) -> Block:
    title = "Path through the layers"
    found: list[tuple[str, Path]] = [
        (_named(name, story), shown.path) for name, shown in story.pictures if shown.path is not None
    ]
    if not found:
        return Block("path", title, "This search leaves every layer in its place, so there is no path to draw.")
    says = (
        "The layers of the merged model from left to right. Each model has a lane with its own layers from bottom to "
        "top; a layer that is merged of several models lies in the lane called merge. The line leads from layer to "
        "layer; it is the wider, the larger the scale of the layer that it leads to."
    )
    if any(shown.parallel for _, shown in found):
        says += (
            " Squares are layers that run side by side: all layers of such a block read what goes into its first one, "
            "and the mean of what they give goes on."
        )
    path = found[0][1]
    lanes = Counter(stop.lane for stop in path.stops)
    notes = (
        f"The winner has {len(path.stops)} layers. Its embeddings {_come(path.embeddings)}, its final norm and head "
        f"{_come(path.head)}.",
        f"Its layers by where they come from: {', '.join(f'{lane} {count}' for lane, count in lanes.items())}. A model "
        "that gives no layer is of no use to it.",
        *([_side_by_side(path)] if path.parallel else []),
    )
    drawing = pictures.paths([name for name, _ in found], [shown for _, shown in found])
    return Block("path", title, says, drawing, notes=notes if story.winner is not None else ())


def _side_by_side(path: Path) -> str:
    blocks = " and ".join(f"layers {start} to {end - 1}" for start, end in path.parallel)
    return f"Side by side run {blocks}. The model can be scored in memory, but no checkpoint can hold it."


def _come(lane: str) -> str:
    return "are merged" if lane == MERGE else f"come from {lane}"


# Genes


def _importances(story: Story) -> Block:
    title = "Importance of genes"
    if isinstance(story.shares, str):
        return Block("importances", title, f"Importances cannot be computed. {story.shares}")
    says = (
        "How much of the variance of the mean on search items each gene explains, as a regression by random forests "
        "sees it (fANOVA). Layers or models whose genes have long bars matter; a gene that hardly moved has a short "
        "bar whatever it does."
    )
    notes = _grouped(story)
    drawing = figures.importances(story.shares)
    return Block("importances", title, says, drawing, notes=notes)


def _grouped(story: Story) -> tuple[str, ...]:
    count = len(story.run.prepared.space.genes)
    if not story.features.grouped:
        return ()
    return (f"The {count} genes are taken together in {len(story.features.features)} groups, by their mean.",)


def _parallel(story: Story) -> Block:
    title = "Parallel coordinates"
    if len(story.features.candidates) < 2:
        return Block(
            "parallel", title, "Fewer than two candidates with genes were scored, so there are no lines to draw."
        )
    if isinstance(story.shares, str):
        names, order = [feature.name for feature in story.features.features], "in the order of the genome"
    else:
        names, order = list(story.shares), "the most important first"
    names = names[:_MOST_AXES]
    says = (
        "Each line is a candidate: the height on an axis is the value of that gene, from its least to its largest. Red "
        "lines are the best fifth. Where red lines meet, the search is sure of the value."
    )
    notes = _grouped(story)
    if len(story.features.features) > len(names):
        notes += (f"{len(names)} of {len(story.features.features)} are drawn, {order}.",)
    drawing = figures.parallel(story.features, names, story.status.mean)
    return Block("parallel", title, says, drawing, notes=notes)


# Parts of the winner


def _ablation(story: Story) -> Block:
    title, found = "What each part of the winner brings", story.ablated
    if found is None:
        command = f"evomerge report {shlex.quote(story.directory)} --ablate"
        return Block(
            "ablation",
            title,
            f"Nobody has asked yet what is left of the winner without its parts. `{command}` scores that, once the "
            "search has ended.",
        )
    start = "the uniform merge" if found.from_uniform else "a model unchanged"
    says = (
        f"Each dot is what the winner loses on held-out items where one group of its genes is put back to {start}, or "
        "where the weights of one model are set to 0; the line is the 95 % interval. Where the line crosses 0, the "
        "part may bring nothing."
    )
    known = [part for part in found.parts if part.lead is not None]
    rows = [(part.name, _PUT_BACK[part.kind], _score(part.mean), *_lead(part)) for part in found.parts]
    head = ("part", "", "left without it", "brings (95 % interval)", "p-value (corrected)")
    notes = [*_needed(found.parts), f"p-values are corrected for {len(known)} parts."]
    notes.append(f"It took {found.evaluations} evaluations, which are not counted as the search's.")
    drawing = figures.parts(known, story.status.mean) if known else None
    return Block("ablation", title, says, drawing, (Table(head, rows),), tuple(notes))


_PUT_BACK = {"group": "genes put back", "model": "weights set to 0"}


def _lead(part: Part) -> tuple[str, str]:
    if part.mean is None:
        return "failed", ""
    if part.lead is None:
        return "", ""
    low, high = part.lead.interval
    return f"{part.lead.difference:+.3f} ({low:+.3f} to {high:+.3f})", _p_value(part.lead.p_value)


def _needed(parts: Sequence[Part]) -> list[str]:
    """Sentences about what the winner needs beyond chance, and what may be useless: groups, then models."""
    told = []
    for kind, what in (("group", "Parts of the genome"), ("model", "Models")):
        listed = [part for part in parts if part.kind == kind and part.lead is not None]
        needed = [part.name for part in listed if part.matters]
        useless = [part.name for part in listed if not part.matters]
        if needed:
            told.append(f"{what} without which the winner is worse beyond chance: {', '.join(needed)}.")
        if useless:
            told.append(f"{what} that may be useless, as far as held-out items tell: {', '.join(useless)}.")
    return told


def _way(story: Story) -> Block:
    title, found = "From the uniform merge to the winner", story.ablated
    if found is None:
        return Block("way", title, "The recipes between the uniform merge and the winner were not scored.")
    start = "uniform merge" if found.from_uniform else "a model unchanged"
    items = "selection" if found.split == "selection" else "search"
    says = (
        f"From left to right, one group of genes after the other becomes the winner's, beginning with the {start}. The "
        f"order follows what each group brings alone on {items} items, the most first. Where the line is flat, the "
        "groups there bring nothing to the others."
    )
    held = [stop.heldout for stop in found.way]
    notes = []
    whole = held[-1] - held[0] if held[-1] is not None and held[0] is not None else 0.0
    if whole > 0 and held[0] is not None:
        first = held[0]
        enough = next(index for index, value in enumerate(held) if value is not None and value - first >= 0.9 * whole)
        notes = [
            f"{enough} of {len(held) - 1} groups reach nine tenths of what the winner is above the {start} on held-out "
            f"items ({whole:+.3f})."
        ]
    return Block("way", title, says, figures.way(found.way, items, story.status.mean, start), notes=tuple(notes))


# Parents


def _retention(story: Story) -> Block:
    title = "What the winner keeps of each parent"
    kept = story.evidence.retention
    if not kept:
        return Block("retention", title, "There is no winner to compare with its parents, or no parent has scores.")
    split = "held-out" if kept[0].items == "heldout" else "search"
    says = (
        f"For each parent, its score on {split} items on the task that it is best at, and the winner's there. A "
        "shorter bar of the winner is what it has lost."
    )
    rows = [(one.parent, one.metric, _score(one.parent_score), _score(one.score), _share(one)) for one in kept]
    head = ("parent", "its best task", "its score", "winner's", "kept")
    return Block("retention", title, says, figures.retention(kept), (Table(head, rows),), _lost(kept, story))


def _lost(kept: Sequence[Kept], story: Story) -> tuple[str, ...]:
    """A sentence about where the winner is worse than a parent."""
    signs = {metric.name: sign_of(metric) for metric in story.run.config.reported}
    worse = [
        f"{one.metric}, {_score(one.score)} instead of {one.parent}'s {_score(one.parent_score)}"
        for one in kept
        if signs[one.metric] * one.score < signs[one.metric] * one.parent_score
    ]
    if not worse:
        return ("The winner has lost nothing of what its parents are best at.",)
    return (f"What the winner has lost: {'; '.join(worse)}.",)


def _share(one: Kept) -> str:
    return "" if one.kept is None else f"{one.kept:.0%}"


def _constraints(story: Story) -> Block:
    title = "Constraints"
    limits = story.run.results.criteria().limits
    if not limits:
        return Block("constraints", title, "This search has no constraints.")
    scores = (story.best.evaluation.scores or {}) if story.best is not None else {}
    rows = []
    for limit in limits:
        reached = scores.get(limit.name)
        margin = ""
        if reached is not None and not math.isnan(limit.bound):  # as it is while the parent has no score
            margin = f"{limit.sign * reached - limit.bound:+.3f}"
        rows.append((str(limit), "" if reached is None else f"{reached:.3f}", margin))
    says = (
        "What a winner must keep, what the winner reaches on search items, and the margin between both; a negative "
        "margin breaks the constraint."
    )
    notes = (f"{story.status.infeasible} candidates break a constraint.",)
    return Block("constraints", title, says, tables=(Table(("constraint", "winner", "margin"), rows),), notes=notes)


def _distance(story: Story) -> Block:
    title = "Distance from the base and the parents"
    if story.best is None:
        return Block("distance", title, "There is no winner whose weights could be compared.")
    try:
        models = story.run.prepared.models
        found: Distances | str = distances(
            story.best.candidate.recipe, story.run.config, models, story.run.statistics.finder(models)
        )
    except EvomergeError as error:
        found = f"Distances cannot be computed: {error}"
    if isinstance(found, str):
        return Block("distance", title, found)
    says = (
        "How far the merged weights are from the base and from each parent, layer by layer, as a share of the norm of "
        "the base's weights there. The broken lines are how far the parents are from the base."
    )
    listed = ", ".join(f"{found.whole[name]:.1%} from {name}" for name in found.whole)
    parents = ", ".join(f"{name} {share:.1%}" for name, share in found.whole_parents.items())
    notes = (f"As a whole, the merge is {listed}. The parents are from the base: {parents}.",)
    return Block("distance", title, says, figures.distances(found), notes=notes)


# Items


def _items(story: Story) -> Block:
    title = "Items that flipped"
    found = story.flips
    if not found:
        return Block("items", title, "The winner has no outcomes on held-out items yet, so no item can be compared.")
    says = (
        "Each tick is a held-out item on which the winner is better (gained) or worse (lost) than a parent or the "
        "base. Items are numbered from 0 in the order in which they are scored."
    )
    rows = [
        (
            one.rival,
            one.metric,
            str(len(one.gained)),
            str(len(one.lost)),
            str(one.count - len(one.gained) - len(one.lost)),
        )
        for one in found
    ]
    head = ("rival", "task", "gained", "lost", "unchanged")
    folded = {
        f"{one.rival}, {one.metric}: item numbers": Table(
            ("", "items"), (("gained", _numbers(one.gained)), ("lost", _numbers(one.lost)))
        )
        for one in found
        if one.gained or one.lost
    }
    notes: tuple[str, ...] = ("The text of the items is left out; --items adds it.",)
    if story.with_items:
        texts, notes = _with_text(story)
        folded |= texts
    return Block("items", title, says, figures.flips(found), (Table(head, rows),), notes, folded=folded)


def _numbers(items: Sequence[int]) -> str:
    more = f" and {len(items) - _MOST_NUMBERS:,} more" if len(items) > _MOST_NUMBERS else ""
    return (", ".join(map(str, items[:_MOST_NUMBERS])) or "none") + more


def _with_text(story: Story) -> tuple[dict[str, Table], tuple[str, ...]]:
    """The questions of the items that flipped, and a sentence about them."""
    try:
        asked = questions(story.run.config, story.run.prepared.models)
    except EvomergeError as error:
        return {}, (f"The text of the items cannot be shown: {error}",)
    shown = shown_questions(asked, story.flips)
    folded, left = {}, _MOST_TEXT
    for one in story.flips:
        texts = shown.get((one.rival, one.metric))
        if not texts:
            continue
        gained = set(one.gained)
        rows: list[tuple[str, ...]] = []
        for number, question in list(texts.items())[:_MOST_FLIPS]:
            row = (str(number), "gained" if number in gained else "lost", *_cut(question))
            left -= sum(map(len, row))
            if left < 0:
                break
            rows.append(row)
        more = f" (the first {len(rows)} of {len(texts)})" if len(rows) < len(texts) else ""
        folded[f"{one.rival}, {one.metric}: questions{more}"] = Table(("item", "", "question", "right answer"), rows)
    unlike = [one.metric for one in story.flips if asked.get(one.metric) and (one.rival, one.metric) not in shown]
    told: tuple[str, ...] = (
        "Scores do not keep what the models answered; whether an answer was right is all that is known.",
    )
    if unlike:
        names = ", ".join(dict.fromkeys(unlike))
        told += (f"The items of {names} are no longer those that were scored, so their text is left out.",)
    return folded, told


def _cut(question: Question) -> tuple[str, str]:
    text = question.text if len(question.text) <= _LONGEST else f"{question.text[:_LONGEST]} …"
    return text, question.answer[:_LONGEST]


# Provenance


def _shipping(story: Story) -> Block:
    title = "Before it ships"
    origin, again = story.provenance, story.rebuilt
    rows = [(source.name, source.reference, source.license or "none stated") for source in origin.sources]
    says = (
        f"The licenses that the models' cards state. A merge of them carries the license {origin.license}, as far as "
        "the cards tell; this is bookkeeping, not legal advice."
    )
    told = (*origin.license_warnings, *(again.warnings if again is not None else ("there is no winner to ship.",)))
    if not told:
        told = ("nothing stands against it: the winner beats every control, and all licenses are known.",)
    notes = tuple(f"{text[:1].upper()}{text[1:]}" for text in told)
    return Block("shipping", title, says, tables=(Table(("model", "reference", "license"), rows),), notes=notes)


def _rebuild(story: Story) -> Block:
    title = "How to rebuild the winner"
    again = story.rebuilt
    if again is None:
        return Block("rebuild", title, "There is no winner that could be built again.")
    says = (
        "The commands write the recipe and the merged checkpoint; merging checks that the weights are bit for bit "
        f"those that were scored, by their fingerprint {again.fingerprint}. The recipe alone is enough."
    )
    commands = f"evomerge export {shlex.quote(story.directory)} -o recipe.yaml\nevomerge merge recipe.yaml merged"
    if again.parallel:
        says = (
            "The commands write the recipe and score it in memory. No checkpoint can hold a model that runs layers "
            "side by side."
        )
        search = shlex.quote(f"{story.directory}/{SEARCH_FILE}")
        commands = commands.splitlines()[0] + f" --evomerge-only\nevomerge evaluate recipe.yaml --config {search}"
    texts = (
        Text("The commands", commands, copied=True, opened=True),
        Text(f"The recipe of {again.candidate}", again.recipe, copied=True),
    )
    return Block("rebuild", title, says, texts=texts)


def _origin(story: Story) -> Block:
    origin = story.provenance
    rows = [(name, version) for name, version in origin.versions.items()]
    rows += [("format of the run", str(origin.format)), ("seed", str(origin.seed))]
    rows += [(f"files of {source.name}", source.identity or "cannot be read") for source in origin.sources]
    rows += list(story.status.aligned.items())
    says = (
        "The versions with which the search began, its seed, and a short fingerprint of each model's files. The same "
        "search file, seed and versions lead to the same archive."
    )
    texts = (Text("The search file, with everything decided", origin.search, copied=True),)
    return Block("origin", "Versions and seeds", says, tables=(Table(("", ""), rows),), texts=texts)


def drawings(made: Sequence[Section]) -> dict[str, Drawing]:
    """The figures of sections, by the ids of their blocks."""
    blocks = (block for section in made for block in section.blocks)
    return {block.id: block.drawing for block in blocks if block.drawing is not None}
