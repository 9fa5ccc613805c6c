"""Archive: every evaluation of a search, durable, and the checkpoint from which it resumes.

The archive is a set of Optuna studies in one storage, so that any Optuna dashboard can show them:

- `search` has one trial for each candidate: a parameter for each gene that counts, a value for each objective.
- `heldout` has the scores of chosen candidates on items that the search never saw.
- `selection`, where the config asks for it, has the scores on the items that decide among them.
- `subset` has the scores on a subset of the search items; `search` then has only candidates scored on all of them.
- `quantized` has the scores of quantized merges; `search` then has only the finalists, scored again unquantized.

An evaluation is one transaction, written by `trials`.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from evomerge.archive import kept
from evomerge.archive.gradients import GradientRecord, Gradients, KeptGradients
from evomerge.archive.storage import brief, open_storage, refusal, storage_url, study_prefix
from evomerge.archive.trials import Trials
from evomerge.candidate import Candidate, Evaluation, Study, Subset
from evomerge.config.documents import shown
from evomerge.config.search import SearchConfig
from evomerge.config.storage_url import masked
from evomerge.errors import EvomergeError, InputError, WorkFailed
from evomerge.events import Listener, StorageRetried, unheard
from evomerge.files import DATABASE, SEARCH_FILE
from evomerge.outcomes import Outcomes
from evomerge.quiet import quiet
from evomerge.recipe import Aligned, Recipe
from evomerge.spaces import Gene, active
from evomerge.versions import FORMAT, versions

_PATIENCE, _PAUSE = 120.0, 0.5  # seconds that a storage may be away, and before the first time it is tried again
_SCORES, _OWN_FILES = ("objectives", "constraints", "report"), ("python", "items")  # whose digest counts
_FREE_TO_CHANGE = (
    "workers",
    "optimizer.evaluations",
    "optimizer.equivalents",
    "evaluation.sources",
    "evaluation.fields",
    "evaluation.adapters",
    "tasks.data_root",
    "trackers",
    *(f"{block}[].{name}" for block in _SCORES for name in _OWN_FILES),
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """When an evaluation came in an asynchronous search.

    number: how many evaluations had come before it.
    asked: how many generations had been proposed by then.
    """

    number: int
    asked: int


@dataclass(frozen=True, slots=True)
class Record:
    """A candidate and its evaluation.

    candidate: what was tried.
    evaluation: its scores, or why it failed.
    arrival: when the evaluation came, in an asynchronous search; otherwise None.
    """

    candidate: Candidate
    evaluation: Evaluation
    arrival: Arrival | None = None


class Archive:
    """The recorded evaluations of one run directory, in memory and in its storage."""

    def __init__(
        self,
        directory: Path,
        config: SearchConfig,
        genes: Sequence[Gene] | Callable[[], Sequence[Gene]],
        prefix: str | None = None,
        writer: Any = None,
        reading: bool = False,
    ) -> None:
        """Opens the archive of a run, or creates it.

        directory: the run directory.
        config: the search.
        genes: the entries of a genome, or what makes them. It is called where the archive has not recorded them.
        prefix: what the names of its studies begin with; by default what the directory and the config say.
        writer: what evaluations are written with (see `presence`); by default the storage's own connections.
        reading: whether nothing will be written, so that a file can be read without Optuna, which takes seconds.
        Raises InputError where it holds another search, or cannot be read.
        """
        self._directory, self._config, self._given = directory, config, genes
        self.listener: Listener = unheard  # is told of StorageRetried
        self._prefix = study_prefix(directory, config) if prefix is None else prefix
        self._names = [objective.name for objective in config.objectives]
        self._storage: Any = None  # Optuna's, where it was opened
        try:
            read = kept.read(directory / DATABASE) if reading and config.storage is None else None
            if read is not None:
                none = kept.KeptStudy({}, ())
                self._studies: dict[Study, Any] = {study: read.studies.get(study, none) for study in studies(config)}
                self._gradients: KeptGradients = KeptGradients(read.gradients.get(self._prefix, ()))
            else:
                self._open(storage_url(directory, config), writer)
            self._check_format(directory)
            self._check_config(directory, writing=read is None)
            self._genes = self._recorded_genes()
            self._records = {study: self._load(study) for study in self._studies}
        except EvomergeError:
            raise
        except Exception as error:  # a damaged storage raises anything, and so do trials that evomerge did not write
            where = directory / DATABASE if config.storage is None else masked(config.storage)
            raise InputError(
                f"{where}: the archive cannot be read ({brief(error)}); check it, or restore it from a copy."
            ) from None

    def _open(self, url: str, writer: Any) -> None:
        """Opens the studies in a storage, or creates them."""
        with quiet():
            self._storage = storage = open_storage(url)
            self._studies = {study: self._study(storage, study) for study in studies(self._config)}
            self._trials = Trials(writer or storage.engine)
            learns = any(name == "learned" for name in self._config.optimizer.names)
            self._gradients = Gradients(writer or storage.engine, self._prefix, writing=learns)

    def _study(self, storage: Any, study: Study) -> Any:
        import optuna

        return optuna.create_study(
            storage=storage,
            study_name=self._prefix + study,
            directions=[objective.goal or "maximize" for objective in self._config.objectives],
            load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(seed=0),
        )

    def beside(self, name: str, writer: Any = None) -> "Archive":
        """Another archive of the same search in the same storage, made where it is missing. It holds evaluations that
        are none of the search's, so whatever it records changes nothing here.

        name: sets it apart from others.
        writer: what evaluations are written with, as when this archive was opened.
        Raises InputError where it cannot be read.
        """
        return Archive(self._directory, self._config, self._genes, self._beside(name), writer)

    def has_beside(self, name: str) -> bool:
        """Whether the storage holds the archive that `beside` opens; nothing is made."""
        import optuna

        with quiet():
            storage = self._storage or open_storage(storage_url(self._directory, self._config))
            names = set(optuna.get_all_study_names(storage))
        return all(self._beside(name) + study in names for study in studies(self._config))

    def _beside(self, name: str) -> str:
        return f"{self._prefix}{name}."

    @property
    def format(self) -> int:
        """The number of the run's format; runs in format 1 do not state it."""
        stated: int = self._studies["search"].user_attrs.get("format", 1)
        return stated if self.recorded_versions() else FORMAT

    def _check_format(self, directory: Path) -> None:
        if self.format > FORMAT:
            made = self.recorded_versions()["evomerge"]
            raise InputError(
                f"{directory}: the run has format {self.format}, but evomerge {versions()['evomerge']} reads formats "
                f"up to {FORMAT}; use evomerge {made}, which made it, or a later one."
            )

    def check_resumable(self, directory: Path) -> list[str]:
        """Warnings about versions that have changed since the search began.

        directory: the run directory, which opens an error's message.
        Raises InputError, with the version to use, where this version would score or search differently.
        """
        before, now = self.recorded_versions(), versions()
        if self.format != FORMAT:
            raise InputError(
                f"{directory}: the search was begun by evomerge {before['evomerge']} in format {self.format}, and this "
                f"version ({now['evomerge']}) would go on with it otherwise; resume it with evomerge "
                f"{before['evomerge']} (status, front, candidates, export and merge work here)."
            )
        changed = [f"{name} {was} to {now[name]}" for name, was in before.items() if now.get(name, was) != was]
        return [
            f"versions have changed since the search began ({', '.join(changed)}), so it may go on otherwise than it "
            "would have; restore them to have the same archive."
        ] * bool(changed)

    def _check_config(self, directory: Path, writing: bool) -> None:
        study = self._studies["search"]
        current = comparable(self._config)
        recorded = study.user_attrs.get("config")
        if recorded is None and not writing:
            return
        if recorded is None:
            with quiet():
                for created in self._studies.values():
                    created.set_metric_names(self._names)
            study.set_user_attr("format", FORMAT)
            study.set_user_attr("versions", versions())
            study.set_user_attr("genes", [asdict(gene) for gene in self._made_genes()])
            study.set_user_attr("config", current)  # last: after a kill before it, all of this is done again
            return
        recorded = _completed(recorded)
        difference = next(differences(recorded, current), None)
        if difference is not None:
            key, was, now = difference
            raise InputError(
                f"{directory / SEARCH_FILE}: {key} is {shown(now)}, but the archive was made with "
                f"{shown(was)}; restore it, or run the changed search in a new directory."
            )
        _move(recorded, current)
        if recorded != current and writing:
            study.set_user_attr("config", current)

    def _recorded_genes(self) -> Sequence[Gene]:
        """The genes as the archive recorded them, since a later version may give them other names."""
        recorded = self._studies["search"].user_attrs.get("genes")
        return self._made_genes() if recorded is None else TypeAdapter(list[Gene]).validate_python(recorded)

    def _made_genes(self) -> Sequence[Gene]:
        return self._given() if callable(self._given) else self._given

    def _load(self, study: Study) -> dict[str, Record]:
        records = map(self._record, _finished(self._studies[study]))
        return {record.candidate.id: record for record in records}

    def _record(self, trial: kept.KeptTrial) -> Record:
        attributes = trial.user_attrs
        genome = self._genome(trial.params) if trial.params else None
        recipe, place = attributes["recipe"], (attributes["generation"], attributes["index"])
        candidate = (
            kept.KeptCandidate(recipe, attributes["id"], attributes["kind"], *place, genome)
            if isinstance(recipe, str)
            else Candidate(attributes["id"], attributes["kind"], *place, Recipe.model_validate(recipe), genome)
        )
        evaluation = Evaluation(
            scores=None
            if trial.values is None
            else {**dict(zip(self._names, trial.values, strict=True)), **attributes.get("guards", {})},
            error=attributes.get("error"),
            outcomes={name: Outcomes.from_json(packed) for name, packed in attributes.get("outcomes", {}).items()},
            items=attributes["items"],
            fingerprint=attributes.get("fingerprint"),
            seconds=attributes["seconds"],
            truncated=attributes.get("truncated", 0),
            subset=Subset(*attributes["subset"]) if "subset" in attributes else None,
            quantize=attributes.get("quantize"),
        )
        arrival = Arrival(*attributes["arrival"]) if "arrival" in attributes else None
        return Record(candidate, evaluation, arrival)

    def _genome(self, params: Mapping[str, float]) -> tuple[float, ...]:
        """A genome. Genes that do not count are not recorded, and stand at their start."""
        return tuple(float(params.get(gene.name, gene.start)) for gene in self._genes)

    def find(self, candidate_id: str, study: Study) -> Record | None:
        """The record of a candidate; None where a study has none.

        candidate_id: the candidate's id.
        study: where to look.
        """
        return self._records[study].get(candidate_id) if study in self._records else None

    def record(
        self, candidate: Candidate, evaluation: Evaluation, study: Study, arrival: Arrival | None = None
    ) -> None:
        """Writes one evaluation in one transaction.

        candidate: what was tried.
        evaluation: its scores, or why it failed.
        study: where to write it.
        arrival: when it came, in an asynchronous search.
        Raises WorkFailed where the storage refuses it, or cannot be reached for two minutes.
        """
        import optuna

        params, distributions = self._parameters(candidate) if candidate.genome is not None else ({}, {})
        state = optuna.trial.TrialState.FAIL if evaluation.failed else optuna.trial.TrialState.COMPLETE
        values = None if evaluation.scores is None else [evaluation.scores[name] for name in self._names]
        trial = optuna.trial.create_trial(
            state=state,
            values=values,
            params=params,
            distributions=distributions,
            user_attrs=_attributes(candidate, evaluation, arrival) | self._guards(evaluation),
        )
        ended = datetime.now()  # as Optuna has it
        trial.datetime_start, trial.datetime_complete = ended - timedelta(seconds=evaluation.seconds), ended
        self._patiently(
            candidate.id,
            lambda: self._trials.add(self._prefix + study, trial),
            lambda: self._holds(candidate.id, study),
        )
        self._records[study][candidate.id] = Record(candidate, evaluation, arrival)

    def record_gradient(self, record: GradientRecord) -> None:
        """Writes what a worker said to one shard of one step, in one transaction.

        record: what is kept of it.
        Raises WorkFailed as `record` does.
        """
        gradients = self._gradients
        assert isinstance(gradients, Gradients)  # an archive that is only read takes no records
        self._patiently(
            f"{record.step}, shard {record.shard}",
            lambda: gradients.add(record),
            lambda: gradients.holds(record),
            "step",
        )

    def find_gradient(self, step: int, shard: int) -> GradientRecord | None:
        """The record of a shard of a step; None where there is none."""
        return self._gradients.find(step, shard)

    def gradients(self) -> list[GradientRecord]:
        """Every record of a shard of a step, by step and shard."""
        return self._gradients.all()

    def _patiently(
        self, identity: str, write: Callable[[], None], written: Callable[[], bool], kind: str = "evaluation"
    ) -> None:
        """Writes exactly once, and waits for a storage that cannot be reached for a short time.

        identity: which one is written, for messages.
        write: writes it.
        written: whether it is there already, since a commit may have come through.
        kind: what is written, in a word, for messages.
        """
        pause, deadline, tried = _PAUSE, time.monotonic() + _PATIENCE, False
        while True:
            try:
                if not (tried and written()):
                    write()
                return
            except EvomergeError:  # the run's lock is lost
                raise
            except Exception as error:
                passing, reason = refusal(error)
                if not passing or time.monotonic() + pause > deadline:
                    raise WorkFailed(
                        f"the archive refused {kind} {identity} ({reason}); nothing was lost: free some "
                        "space or restore the storage, then resume."
                    ) from None
            tried = True
            self.listener(StorageRetried(identity, reason, pause))
            time.sleep(pause)
            pause = min(2 * pause, 15.0)

    def _holds(self, identity: str, study: Study) -> bool:
        trials = self._studies[study].get_trials(deepcopy=False)
        return any(trial.user_attrs.get("id") == identity for trial in trials)

    def _guards(self, evaluation: Evaluation) -> dict[str, Any]:
        """The scores of metrics that are not objectives."""
        scores = evaluation.scores or {}
        guards = {name: score for name, score in scores.items() if name not in self._names}
        return {"guards": guards} if guards else {}

    def genes(self, candidate: Candidate) -> dict[str, float | int | str] | None:
        """The genes of a candidate that count, by name, with the choices of categorical genes; None for a candidate
        without a genome."""
        if candidate.genome is None:
            return None
        counts = active(self._genes, np.array(candidate.genome))
        values = zip(self._genes, candidate.genome, counts, strict=True)
        return {gene.name: _shown_value(gene, value) for gene, value, counted in values if counted}

    def _parameters(self, candidate: Candidate) -> tuple[dict[str, Any], dict[str, Any]]:
        """Optuna's parameters and their distributions, for the genes that count."""
        params = self.genes(candidate) or {}
        return params, {gene.name: _distribution(gene) for gene in self._genes if gene.name in params}

    def records(self, study: Study = "search") -> list[Record]:
        """Every recorded evaluation, controls first, then by generation and index."""
        return sorted(self._records[study].values(), key=lambda record: place(record.candidate))

    def tried(self) -> list[Record]:
        """Every candidate, in the same order as `records`: scored on all search items, or else quantized, or else on a
        subset of the items."""
        latest = {record.candidate.id: record for record in self.steered()} | self._records["search"]
        return sorted(latest.values(), key=lambda record: place(record.candidate))

    def steered(self) -> list[Record]:
        """Every candidate as `tried` has it, but with the scores that the search went by: where these are quantized,
        finalists have them, too."""
        latest = {**self._records.get("subset", {}), **self._records[steering(self._config)]}
        return sorted(latest.values(), key=lambda record: place(record.candidate))

    def arrivals(self) -> list[Record]:
        """The search candidates of an asynchronous search in the order in which their evaluations came."""
        recorded = [
            (record.arrival.number, record)
            for record in self._records[steering(self._config)].values()
            if record.arrival
        ]
        return [record for _, record in sorted(recorded, key=lambda pair: pair[0])]

    def record_end(self, budget: float, early: str = "") -> None:
        """Records that the search has come to its end.

        budget: that it had.
        early: why it ended before this was spent; empty where it was spent.
        """
        self._studies["search"].set_user_attr("early", early)
        self._studies["search"].set_user_attr("ended", budget)

    @property
    def ended(self) -> float | None:
        """The budget with which the search has come to its end; None where it has not, or did not record it."""
        ended: float | None = self._studies["search"].user_attrs.get("ended")
        return ended

    @property
    def early(self) -> str:
        """Why the search has ended before its budget was spent; empty where it has not, or did not record it."""
        early: str = self._studies["search"].user_attrs.get("early", "") if self.ended is not None else ""
        return early

    def check_sources(self, sources: Mapping[str, str]) -> None:
        """Raises InputError where a source model has changed since the archive was made.

        sources: the identities of the models, by their keys in the config.
        """
        for key, recorded in self._studies["search"].user_attrs.get("sources", {}).items():
            if key in sources and sources[key] != recorded:
                raise InputError(
                    f"{key}: the model's files have changed since this search began, so what it scored cannot be made "
                    "again; restore them, or run the search in a new directory."
                )

    def record_sources(self, sources: Mapping[str, str]) -> None:
        """Records the identities of source models, by their keys in the config, unless there are recorded ones."""
        if "sources" not in self._studies["search"].user_attrs:
            self._studies["search"].set_user_attr("sources", dict(sources))

    def record_seen(self, seen: str) -> None:
        """Records the items that the search sees (`evomerge.seen`), unless there are recorded ones."""
        if self.seen is None:
            self._studies["search"].set_user_attr("seen", seen)

    @property
    def seen(self) -> str | None:
        """The items that the search sees (`evomerge.seen`); None in runs that did not record them."""
        seen: str | None = self._studies["search"].user_attrs.get("seen")
        return seen

    def record_statistics(self, names: Mapping[str, Mapping[str, str]]) -> None:
        """Records which statistics of the models the search's methods use: the names of their folders, by the model's
        reference and the kind. Raises InputError where others are recorded.
        """
        recorded = self.statistics
        for reference, kinds in names.items():
            for kind, name in kinds.items():
                before = recorded.get(reference, {}).get(kind)
                if recorded and before != name:
                    raise InputError(
                        f"statistics: the {kind} of {reference} are {name}, but the search began with {before}; "
                        "restore the run's statistics, or run the search in a new directory."
                    )
        if names and not recorded:
            self._studies["search"].set_user_attr("statistics", {key: dict(kinds) for key, kinds in names.items()})

    @property
    def statistics(self) -> Mapping[str, Mapping[str, str]]:
        """The names of the folders with statistics, by the model's reference and the kind."""
        return dict(self._studies["search"].user_attrs.get("statistics", {}))

    def record_aligned(self, aligned: Mapping[str, Aligned]) -> None:
        """Records what the alignment of models brought, by the model's name, unless that is recorded."""
        if aligned and not self.aligned:
            found = {name: own.model_dump(mode="json") for name, own in aligned.items()}
            self._studies["search"].set_user_attr("aligned", found)

    @property
    def aligned(self) -> Mapping[str, Aligned]:
        """What the alignment of models brought, by the model's name; empty where none was aligned."""
        found = self._studies["search"].user_attrs.get("aligned", {})
        return {name: Aligned.model_validate(own) for name, own in found.items()}

    def recorded_versions(self) -> Mapping[str, str]:
        """The versions that the search began with, by package; empty in a new archive."""
        return dict(self._studies["search"].user_attrs.get("versions", {}))


def _shown_value(gene: Gene, value: float) -> float | int | str:
    if gene.domain == "categorical":
        return gene.choices[int(value)]
    return int(value) if gene.domain == "integer" else value


def _distribution(gene: Gene) -> Any:
    from optuna import distributions

    if gene.domain == "categorical":
        return distributions.CategoricalDistribution(gene.choices)
    if gene.domain == "integer":
        return distributions.IntDistribution(int(gene.low), int(gene.high))
    return distributions.FloatDistribution(gene.low, gene.high)


def _finished(study: Any) -> Sequence[kept.KeptTrial]:
    """The finished trials of a study, whether Optuna has read it or not."""
    if isinstance(study, kept.KeptStudy):
        return study.trials
    return [
        kept.KeptTrial(trial.values, _as_stored(trial.params, trial.distributions), trial.user_attrs)
        for trial in study.get_trials(deepcopy=False)
        if trial.state.is_finished()
    ]


def _as_stored(params: Mapping[str, Any], distributions: Mapping[str, Any]) -> dict[str, float]:
    return {name: distributions[name].to_internal_repr(value) for name, value in params.items()}


def place(candidate: Candidate) -> tuple[int, int]:
    """The key that sorts candidates in the order of the search."""
    return candidate.generation, candidate.index


def _attributes(candidate: Candidate, evaluation: Evaluation, arrival: Arrival | None) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "id": candidate.id,
        "kind": candidate.kind,
        "generation": candidate.generation,
        "index": candidate.index,
        "items": evaluation.items,
        "seconds": round(evaluation.seconds, 4),
        "recipe": candidate.recipe.model_dump(mode="json", exclude_defaults=True),
    }
    if arrival is not None:
        attributes["arrival"] = [arrival.number, arrival.asked]
    if evaluation.fingerprint is not None:
        attributes["fingerprint"] = evaluation.fingerprint
    if evaluation.error is not None:
        attributes["error"] = evaluation.error
    if evaluation.subset is not None:
        attributes["subset"] = [evaluation.subset.number, evaluation.subset.share]
    if evaluation.quantize is not None:
        attributes["quantize"] = evaluation.quantize
    if evaluation.truncated:
        attributes["truncated"] = evaluation.truncated
    if evaluation.outcomes:
        attributes["outcomes"] = {name: outcomes.to_json() for name, outcomes in evaluation.outcomes.items()}
    return attributes


def studies(config: SearchConfig) -> tuple[Study, ...]:
    """The studies that a search keeps."""
    kept: list[Study] = ["subset"] if config.subsets is True else []
    kept += ["quantized"] if config.evaluation.quantize is not None else []
    return (*kept, *config.splits)


def steering(config: SearchConfig) -> Study:
    """The study of the scores on all search items that a search goes by."""
    return "quantized" if config.evaluation.quantize is not None else "search"


def comparable(config: SearchConfig) -> dict[str, Any]:
    """A config as JSON, without its storage, whose URL may hold a password, and without the folders of aligned models,
    which move with a run."""
    left_out: Any = {"storage": True, "align": {"__all__": {"folder"}}}
    return config.model_dump(mode="json", by_alias=True, exclude=left_out)


def _completed(recorded: dict[str, Any]) -> dict[str, Any]:
    """A recorded config with the defaults of keys that came later; as it is where it can no longer be read."""
    try:
        return comparable(SearchConfig.model_validate(recorded))
    except ValidationError:
        return recorded


def _move(recorded: dict[str, Any], current: dict[str, Any]) -> None:
    """Puts the places of a config into a recorded one, since neither the directory of a command nor that of a run
    changes a result."""
    recorded["tasks"]["data_root"] = current["tasks"]["data_root"]
    for block in _SCORES:
        for was, now in zip(recorded[block], current[block], strict=True):
            was |= {name: now[name] for name in _OWN_FILES}


def differences(was: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The key paths, in order, at which two configs differ in something that decides the archive, with both values.

    was: a config, as JSON has it.
    now: the other.
    key: the path at which they stand.
    """
    if re.sub(r"\[\d+\]", "[]", key) in _FREE_TO_CHANGE or was == now:
        return
    if isinstance(was, dict) and isinstance(now, dict):
        names = dict.fromkeys([*was, *now])
        pairs = [(was.get(name), now.get(name), f"{key}.{name}" if key else name) for name in names]
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        pairs = [(*pair, f"{key}[{index}]") for index, pair in enumerate(zip(was, now, strict=True))]
    else:
        yield key, was, now
        return
    for pair in pairs:
        yield from differences(*pair)
