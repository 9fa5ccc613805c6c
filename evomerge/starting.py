"""Ways to begin: a first search file made of models, tasks and a budget; and the demo, which comes with evomerge.

What is written has passed all that `check` looks at. Every choice is explained beside its key.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge import zoo
from evomerge.config.documents import validate
from evomerge.config.files import of_document
from evomerge.config.search import SearchConfig
from evomerge.conversion.draft import Draft, Folder, named
from evomerge.errors import InputError, naming
from evomerge.layers import layer_count
from evomerge.search.controls import count_controls, essential_controls

if TYPE_CHECKING:
    from evomerge.search.preparation import Prepared

EVALUATIONS = 300  # where no budget is given
_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_TIME = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")
_FEWEST = 8  # candidates; a search of fewer learns nothing
_GROUPS = 8  # of layers at most
_SPARE = 0.8  # of a time budget; the rest is for starting up and for scores on selection and held-out items
_MEASURED = 8  # items of a task on which a candidate is timed
_ITEMS = {"search": 200, "selection": 100, "heldout": 400}
_TOO_FEW = 60  # items on the search's side, of which none are spared for selection


def demo_file(smoke: bool) -> Path:
    """The demo's search file.

    smoke: whether it is the short one.
    """
    return zoo.shared("search_spaces") / ("smoke.yaml" if smoke else "demo.yaml")


@dataclass(frozen=True, slots=True)
class Budget:
    """What a search may take: one of the two.

    evaluations: how many candidates.
    seconds: how long.
    text: as it was given.
    """

    evaluations: int | None
    seconds: float | None
    text: str


def parse_budget(text: str | None) -> Budget:
    """A budget as people write it: `300` candidates, or a time such as `2h`, `90m` or `1h30m`.

    text: the budget; None for the usual number of candidates.
    Raises InputError for anything else, and for fewer candidates than a search can learn from.
    """
    if text is None:
        return Budget(EVALUATIONS, None, str(EVALUATIONS))
    if text.isdecimal():
        if int(text) < _FEWEST:
            raise InputError(f"--budget is {text}; use at least {_FEWEST} candidates, or a time such as 2h.")
        return Budget(int(text), None, text)
    found = _TIME.fullmatch(text.replace(" ", "").lower())
    seconds = (
        sum(float(part or 0) * unit for part, unit in zip(found.groups(), _UNITS.values(), strict=True)) if found else 0
    )
    if not seconds:
        raise InputError(f"--budget is '{text}'; use a number of candidates such as 300, or a time such as 2h or 90m.")
    return Budget(None, seconds, text)


def search_file(
    base: str, models: Sequence[str], tasks: Sequence[str], paths: Sequence[str], budget: Budget, folder: Path
) -> str:
    """A search file with comments.

    base: the base's reference.
    models: NAME=REFERENCE, or only the reference, for each model.
    tasks: TASK, TASK:METRIC or TASK:METRIC:FILTER for each objective.
    paths: folders with tasks.
    budget: what the search may take.
    folder: where the file will lie.
    Raises InputError where a search of these would not pass `check`.
    """
    draft = _begun(base, models, tasks, paths, Folder(folder))
    first = _prepared(draft, folder)
    _name_metrics(draft, first)
    _choose_items(draft, first)
    _choose_space(draft, first, budget.evaluations or EVALUATIONS)
    _choose_workers(draft, first)
    if budget.seconds is None:
        assert budget.evaluations is not None
        _choose_controls(draft, budget.evaluations)
        _count(draft, budget.evaluations)
    else:
        _fill(draft, _prepared(draft, folder), budget.seconds, budget.text)
    draft.settings["seed"] = 1
    _prepared(draft, folder)
    return draft.text("Made by `evomerge init`. Every key is explained in docs/reference.md; change what you like.")


def _begun(base: str, models: Sequence[str], tasks: Sequence[str], paths: Sequence[str], folder: Folder) -> Draft:
    """A draft with what the user has said."""
    draft = Draft()
    draft.settings = {
        "base": folder.relocated(base),
        "models": _models(models, folder),
        **({"tasks": {"paths": [folder.place(path, is_path=True) for path in paths]}} if paths else {}),
        "objectives": [_objective(task) for task in tasks],
    }
    draft.say("models", "The models to merge, all tuned from the base: folders, Hugging Face ids, or LoRA adapters.")
    draft.say("objectives", 'What to improve. Several objectives give a Pareto front; "best" is the highest mean.')
    return draft


def _models(given: Sequence[str], folder: Folder) -> dict[str, str]:
    """References by name. Models without a name get the last part of their reference."""
    models: dict[str, str] = {}
    for text in given:
        name, separator, reference = text.partition("=")
        if not separator:
            name, reference = next(iter(named([text]))), text
        if not reference or not name:
            raise InputError(f"--model is '{text}'; expected NAME=REFERENCE, such as math=./models/math.")
        if name in models:
            raise InputError(f"--model {text}: two models are called {name}; give each a name of its own.")
        models[name] = folder.relocated(reference)
    return models


def _objective(text: str) -> dict[str, Any]:
    parts = text.split(":")
    if len(parts) > 3 or not all(parts):
        raise InputError(f"--task is '{text}'; expected TASK, TASK:METRIC or TASK:METRIC:FILTER.")
    return dict(zip(("task", "metric", "filter"), parts, strict=False))


def _prepared(draft: Draft, folder: Path) -> "Prepared":
    """The draft, prepared as a search is before it runs."""
    from evomerge.search.preparation import prepare

    with naming("a search of these models and tasks"):
        return prepare(of_document(draft.settings, "the search file", folder))


def _name_metrics(draft: Draft, prepared: "Prepared") -> None:
    """Writes the metrics that tasks have and nobody named."""
    for written, objective in zip(draft.settings["objectives"], prepared.config.objectives, strict=True):
        written.setdefault("metric", objective.metric)


def _choose_items(draft: Draft, prepared: "Prepared") -> None:
    """As many items as the smallest task has, up to what a search of a few hundred candidates needs."""
    from evomerge.evaluation.items import Division
    from evomerge.evaluation.loading import distinct_tasks, forked
    from evomerge.evaluation.rendering import items_of, selection_split

    assert prepared.targets is not None
    tasks = distinct_tasks(forked(prepared.targets))
    everything = prepared.config.items.model_copy(update={"search": None, "selection": False, "heldout": None})
    division = Division(tasks, everything, prepared.models.seen)
    taken = division.digests("search", "heldout")
    own = {  # how many items there are in splits that tasks keep for selection
        task: sum(item.digests.isdisjoint(taken) for item in items_of(task, "selection"))
        for task in tasks
        if selection_split(task) is not None
    }
    least, heldout = (min(len(division.of(task, split)) for task in tasks) for split in ("search", "heldout"))
    shared = min((len(division.of(task, "search")) for task in tasks if task not in own), default=None)
    spared = _ITEMS["selection"] if shared is None else shared // 3 if shared >= _TOO_FEW else 0
    selection = min(_ITEMS["selection"], spared, *own.values())
    left = least if shared is None else min(least, shared - selection)
    draft.settings["items"] = {
        "search": min(_ITEMS["search"], left),
        "selection": selection or False,
        "heldout": min(_ITEMS["heldout"], heldout),
    }
    where = "the first two" if shared is not None else "the first"
    chosen = "" if shared is not None else f", {min(own.values())} in a split of its own for the second"
    draft.say(
        "items",
        "Items of each task, no item twice: the search improves candidates on the first, the second choose the best of "
        f"the front, and the report is made from the third. The smallest task has {least} items for {where}{chosen}, "
        f"and {heldout} for the third.",
    )
    if not selection:
        draft.say("items", "These are too few to spare some for choosing, so the best is chosen on the search items.")


def _choose_space(draft: Draft, prepared: "Prepared", budget: int) -> None:
    """A method for so many models, and as many groups of layers as the budget can tell apart."""
    count, layers = len(prepared.config.models), layer_count(prepared.models.table)
    fitting = budget // (8 * count) - 2  # groups with two genes a model, four candidates a gene; two are outside layers
    groups = max(1, min(_GROUPS, layers, fitting))
    granularity = math.ceil(layers / groups)
    method = "task_arithmetic" if count == 1 else "dare_ties"
    draft.settings["space"] = {"method": method, "layer_granularity": granularity}
    why = (
        "with one model there are no conflicts to resolve" if count == 1 else "it keeps models from undoing each other"
    )
    draft.say("space", f"What may vary. {method}: {why}. A list, such as [{method}, linear], lets the search choose.")
    shares = f"{granularity} of the {layers} layers share their numbers"
    if granularity == 1:
        shares = f"each of the {layers} layers has numbers of its own"
    draft.say(
        "space",
        f"layer_granularity: {shares}, since the budget can tell {math.ceil(layers / granularity)} of at most "
        f"{_GROUPS} groups apart.",
    )


def _choose_controls(draft: Draft, evaluations: int) -> None:
    """The controls that together cost no more than the search."""
    asked: dict[str, bool] = {}
    for name in ("one_knob", "per_model"):
        asked[name] = True
        if _controls(draft, asked) > max(evaluations, _FEWEST):
            asked[name] = False
    draft.settings["controls"] = asked
    draft.say(
        "controls",
        "What the search has to beat, besides base, parents and uniform merge. one_knob: the usual methods with one "
        "weight and density for all. per_model: a grid over one weight per model. They are on where they cost no more "
        "than the search itself. random_search: true would add as many random candidates as the search has.",
    )


def _controls(draft: Draft, asked: Mapping[str, bool]) -> int:
    """How many controls there are; too many where a grid cannot be made."""
    try:
        return count_controls(validate(SearchConfig, draft.settings | {"controls": asked}, "the search file"))
    except InputError:
        return 10**9


def _choose_workers(draft: Draft, prepared: "Prepared") -> None:
    gpu = prepared.config.evaluation.device.startswith("cuda")
    several = gpu or (os.cpu_count() or 1) > 1
    draft.settings["workers"] = {"pool": "ray", **({"num_gpus": 1} if gpu else {})} if several else {"pool": "local"}
    each = "GPU" if gpu else "CPU core"
    told = f"One worker per {each}." if several else "One after another in this process, since there is one CPU core."
    draft.say("workers", f"{told} Nothing here changes a result.")


def _count(draft: Draft, evaluations: int) -> None:
    draft.settings["optimizer"] = {"name": "auto", "evaluations": evaluations}
    draft.say(
        "optimizer",
        "auto: follows gradients first where tasks and method allow it, then evolves, by an optimizer that suits the "
        "space.",
    )


def _fill(draft: Draft, prepared: "Prepared", seconds: float, text: str) -> None:
    """Turns a time into a number of candidates, by the time that the uniform merge takes on this machine."""
    each = _seconds_per_candidate(prepared)
    count = int(_SPARE * seconds / each)
    _choose_controls(draft, count // 3)
    evaluations = count - _controls(draft, draft.settings["controls"])
    if evaluations < _FEWEST:
        least = math.ceil((_FEWEST + count - evaluations) * each / _SPARE / 60)
        raise InputError(
            f"--budget is {text}, but a candidate takes about {each:.2g} s here, so that {max(0, evaluations)} remain "
            f"beside the controls; give at least {least}m."
        )
    _count(draft, evaluations)
    draft.say(
        "optimizer",
        f"evaluations: the uniform merge was timed on a few items here, by which a candidate takes about {each:.2g} s. "
        f"{_SPARE:.0%} of {text} is then {count} candidates, of which {count - evaluations} are controls. Nothing "
        "stops the search when the time is over; Ctrl-C does, and `evomerge resume` goes on.",
    )


def _seconds_per_candidate(prepared: "Prepared") -> float:
    """How long a worker takes for a candidate on all search items, by its time for a few."""
    from evomerge.workers.worker import Worker

    config, all_items = prepared.config, prepared.config.items.search or _MEASURED
    few = min(_MEASURED, all_items)
    config = config.model_copy(update={"items": config.items.model_copy(update={"search": few})})
    worker = Worker(config, prepared.models, prepared.targets)
    recipe = essential_controls(config)[-1].recipe
    worker.evaluate(recipe, "search")  # the first is slower
    evaluation = worker.evaluate(recipe, "search")
    if evaluation.failed:
        raise InputError(f"the uniform merge cannot be scored ({evaluation.error}); give --budget as a number.")
    return max(1e-3, evaluation.seconds) * all_items / few
