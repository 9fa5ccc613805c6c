"""Chooses the candidate to export, and says what its user should know before sharing it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from evomerge.archive.archive import Record
from evomerge.candidate import Study
from evomerge.config.search import SearchConfig
from evomerge.errors import InputError, WorkFailed, choices
from evomerge.evidence.comparison import against, sentence
from evomerge.search.best import best_of, means
from evomerge.search.results import Results, all_failed, none_feasible


def choose(results: Results, candidate: str | None, prefer: Sequence[str]) -> Record:
    """The record to export: by id, by preferences over the front, or by default the best.

    results: the search's.
    candidate: the id of the candidate; None to choose by preferences or the best.
    prefer: weights of objectives, as OBJECTIVE=WEIGHT; empty for the best.
    Raises InputError for an id or preferences that cannot be used, and WorkFailed where all candidates failed or none
    keeps to the constraints.
    """
    records = results.records()
    if candidate is not None and prefer:
        raise InputError(f"--candidate {candidate} and --prefer {prefer[0]} were both given; give one of them.")
    if candidate is not None:
        return _by_id(results, candidate)
    best = _preferred(results, prefer) if prefer else results.best()
    if best is None and all(record.evaluation.failed for record in records):
        raise InputError("the archive holds no successful evaluation yet, so there is nothing to export.")
    failed = all_failed(results)
    if failed is not None:
        raise WorkFailed(f"{failed}, so there is nothing to export; --candidate names a control if you want one.")
    if best is None:
        raise WorkFailed(none_feasible(results))
    return best


def _by_id(results: Results, candidate: str) -> Record:
    whole = [record for record in results.archive.tried() if record.evaluation.subset is None]
    by_id = {record.candidate.id: record for record in whole}
    if candidate not in by_id:
        shown = choices(candidate, by_id) if len(by_id) <= 12 else "`evomerge candidates` lists them"
        raise InputError(f"--candidate {candidate}: no such candidate in this run; {shown}.")
    if by_id[candidate].evaluation.failed:
        raise InputError(f"--candidate {candidate} failed ({by_id[candidate].evaluation.error}); choose another.")
    broken = [
        f"{limit}, while it reaches {scores[limit.name]:.3f}"
        for limit in results.judge(by_id[candidate]).limits
        if (scores := by_id[candidate].evaluation.scores) is not None and limit.violation(by_id[candidate].evaluation)
    ]
    if broken:
        raise InputError(f"--candidate {candidate} breaks a constraint ({broken[0]}); choose another.")
    return by_id[candidate]


def _preferred(results: Results, prefer: Sequence[str]) -> Record | None:
    weights = _preferences(results.config, prefer)
    objectives = tuple(
        objective.model_copy(update={"weight": weights[objective.name]})
        for objective in results.config.objectives
        if weights.get(objective.name, 0) > 0
    )
    return best_of(results.front(), replace(results.criteria(), objectives=objectives))


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


def warnings(record: Record, results: Results) -> list[str]:
    """What a user should know before sharing a candidate, as sentences.

    They name controls that score as high as the candidate, and rivals from which held-out items do not tell it apart.

    record: the candidate's.
    results: the search's.
    """
    sentences = []
    if record.candidate.kind == "control":
        what = (
            "a merge that the search had to beat"
            if len(record.candidate.recipe.references) > 1
            else "a model unchanged"
        )
        sentences.append(f"{record.candidate.id} is a control, {what}, and no candidate of the search.")
    if record.evaluation.quantize is not None:
        sentences.append(
            f"{record.candidate.id} was scored with quantized weights ({record.evaluation.quantize}), and what ships "
            "is unquantized; `evomerge evaluate` scores that."
        )
    sentences += _needed_copies(record, results)
    studies: dict[Study, str] = {results.study: "search", "heldout": "held-out"}
    for study, items in studies.items():
        records = results.archive.records(study)
        mine = results.archive.find(record.candidate.id, study)
        criteria = results.criteria(study)
        rival = best_of([other for other in records if other.candidate.kind == "control"], criteria)
        if mine is None or rival is None or rival.candidate.id == record.candidate.id:
            continue
        own, theirs = means([mine, rival], criteria)
        if theirs >= own:
            scores = "scores" if not criteria.scales else f"has a {criteria.mean_name} of"
            sentences.append(
                f"the control {rival.candidate.id} {scores} {theirs:.3f} on {items} items, this one {own:.3f}."
            )
    for compared in against(results, [record.candidate.id])[record.candidate.id]:
        if compared.verdict != "better":
            sentences.append(f"{sentence(compared)}.")
    return sentences


def _needed_copies(record: Record, results: Results) -> Iterator[str]:
    """A sentence for every aligned model of a candidate, which exists nowhere but in its run."""
    for name, own in results.archive.aligned.items():
        folder = results.config.align[name].folder
        if folder is not None and own.model in record.candidate.recipe.references:
            yield f"the recipe needs {folder}, which is {own.sentence}; keep that folder, and bring it along."
