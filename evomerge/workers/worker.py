"""Worker: holds the models, merges recipes in place and scores them. It knows nothing of Ray or of the search."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from evomerge.candidate import Descent, Evaluation, Gradient, Measured, Part, Shard, Subset, failure
from evomerge.config.base import Split
from evomerge.config.search import SearchConfig
from evomerge.config.spaces import RowsConfig
from evomerge.config.tables import COSTS, imported
from evomerge.devices import (
    count_gpus,
    device_count,
    devices_of,
    empty_cache,
    is_accelerator,
    resolve_device,
    synchronize,
)
from evomerge.errors import CandidateFailed, InputError, WorkerPoisoned, WorkFailed, first_line, naming
from evomerge.evaluation.activations import digest_of
from evomerge.evaluation.calibration import Calibration
from evomerge.evaluation.engine import Engine
from evomerge.evaluation.harness import WHOLE, Harness, Tokens
from evomerge.evaluation.loading import Target
from evomerge.evaluation.own_files import OwnFiles, read_own
from evomerge.evaluation.own_scores import OwnItems, OwnScore, OwnScores
from evomerge.merging import methods, vocabulary
from evomerge.merging.methods.base import JOINT, Kind
from evomerge.merging.naming import Naming, named_weights, naming_of
from evomerge.merging.resident.gradients import checkpointed
from evomerge.merging.resident.models import ResidentModels
from evomerge.merging.resident.rehearsal import RehearsedModels
from evomerge.merging.resident.sources import resolve
from evomerge.merging.sources.models import Model, Models, models_of
from evomerge.merging.sources.statistics import Find, Names, Readable, Shelf, Stored, subject
from evomerge.merging.sources.tokenizers import read_tokenizer
from evomerge.recipe import Recipe, Source, single
from evomerge.seen import Digests
from evomerge.versions import versions
from evomerge.workers import measuring
from evomerge.workers.row_weights import row_weights

T = TypeVar("T")
_ROWS_FROM = 1 << 20  # the number of the first mini-batch for row weights, so that no later step reads the same


class Worker:
    """The models and prepared tasks of one process."""

    def __init__(
        self,
        config: SearchConfig,
        models: Models | None = None,
        targets: Mapping[str, Target] | None = None,
        *,
        rehearsal: RehearsedModels | None = None,
        seen: Digests = frozenset(),
        head_apart: bool = False,
        own: Mapping[str, OwnFiles] | None = None,
        statistics: Shelf | Path | None = None,
        names: Names | None = None,
    ) -> None:
        """Loads the models and prepares the tasks.

        config: the search's, resolved.
        models: the models that recipes may name, where their headers are read already; by default they are read here.
        targets: the tasks, where they are loaded already; by default they are loaded here.
        rehearsal: the models without data, where the worker is to count memory (`rehearse_scoring`) and score nothing.
        seen: digests of items that must not be held out, besides those that were seen when the models were made.
        head_apart: see ResidentModels.
        own: the files of the user's own scores, where they are read already; by default they are read here. A rehearsal
            does not run their code.
        statistics: where statistics of the models are looked for; a folder is that of a run, where `measure` writes
            them.
        names: the names of the statistics in this folder that the run has used before.
        Raises InputError where the models, the tasks or the user's own scores cannot be loaded.
        """
        torch.set_num_threads(config.evaluation.threads)
        models = models or models_of(config)
        self._config, self._sources, self._folder = config, models, statistics if isinstance(statistics, Path) else None
        self._shelf = statistics if isinstance(statistics, Shelf) else _shelf_of_run(statistics, names)
        self._found: dict[tuple[Kind, str], Readable] = {}
        self.models: ResidentModels = rehearsal or _resident_models(config, models, head_apart, self._statistics)
        engine = (
            Engine(config.evaluation, models.base.folder, self.models.model, named_weights(self.models.model))
            if config.evaluation.backend == "vllm" and not rehearsal
            else None
        )
        tokenizer = base_tokenizer(config, models.base)
        own = read_own(config) if own is None else own
        items = OwnItems.of(config, own)
        self._own = None if rehearsal or not own else OwnScores(config, own)
        self._tokenizer = tokenizer
        self._harness = Harness(
            config,
            self.models.model,
            tokenizer,
            engine,
            seen | models.seen,
            targets,
            items,
            partial(self._statistics, "outputs"),
        )
        costs = [objective.cost for objective in config.objectives if objective.cost is not None]
        costs = [cost for cost in costs if not COSTS[cost].of_texts]  # those are counted in what is answered
        self._learns = config.optimizer.follows_gradients
        self._checkpointing = config.optimizer.learning.checkpointing is True  # `auto` is resolved before
        self._reports = bool(config.report)  # held-out items then have further tasks, which may take more memory
        self._asked = {cost: imported(COSTS[cost].measure) for cost in costs}
        self._calibrations: dict[str, Calibration] = {}
        self._held: tuple[Recipe, bool, str] | None = None  # the recipe whose merge is in memory, with its fingerprint
        for split in config.splits:  # all of them now, so that an item that cannot be scored shows before the search
            self._harness.prepare(split)
        if engine is not None:
            engine.start(self._harness.texts)

    def left_out(self, split: Split) -> int:
        """How many items of a split were left out because a search has seen them."""
        return self._harness.left_out(split)

    def tokens(self, split: Split) -> Tokens:
        """The tokens of a split, all of which a candidate reads or writes to be scored on it."""
        return self._harness.tokens(split)

    def answers(self, reference: str) -> Mapping[tuple[int, ...], int]:
        """By what statistics of a model are measured on, as tokens with a right answer: the first token of the answer.

        reference: the model's.
        Raises InputError where there is nothing to measure on.
        """
        return self._calibration(reference).answers

    def rehearse_scoring(self, recipe: Recipe) -> None:
        """Scores the candidate that was rehearsed last, on the meta device, where nothing is computed, so that memory
        can be counted. Where the search follows gradients, one is computed, too.

        recipe: the candidate's.
        """
        self._harness.rehearse("heldout" if self._reports else "search", self.models.candidate)
        wanted = methods.get(recipe.merge_method, "merge_method").slopes
        if self._learns and wanted:
            with self.models.following(wanted), self._layers_again():
                self._harness.rehearse_descent(self.models.candidate)
        elif self._config.rows is not None:
            with self.models.following_rows(), self._layers_again():
                self._harness.rehearse_descent(self.models.candidate)

    def evaluate(
        self, recipe: Recipe, split: Split, subset: Subset | None = None, quantized: bool = False
    ) -> Evaluation:
        """The evaluation of a recipe. Failures of the candidate are recorded in it, not raised.

        recipe: the candidate's.
        split: the split to score it on.
        subset: the part of the search items to score it on; None for all items.
        quantized: whether the merge is quantized before it is scored.
        Raises WorkerPoisoned where the GPU can compute nothing any more or the engine has ended, WorkFailed where a
        function of the user's own gets no answer from outside, and InputError for a recipe that does not fit the models
        and a function that does not do what it must.
        """
        part = self.evaluate_shard(recipe, split, subset, WHOLE, quantized)
        return part if isinstance(part, Evaluation) else self.join(split, subset, [part])

    def evaluate_shard(
        self, recipe: Recipe, split: Split, subset: Subset | None, shard: Shard, quantized: bool = False
    ) -> Part | Evaluation:
        """One shard of a recipe's evaluation; a failed evaluation where the candidate fails.

        recipe, split, subset, quantized: as in `evaluate`.
        shard: the shard.
        Raises WorkerPoisoned and InputError as `evaluate` does.
        """
        started = time.perf_counter()
        if self._harness.is_empty(split, subset, shard) and shard.number > 0:
            return Part(shard, self._harness.answers(split, None, subset, shard))

        def score(fingerprint: str) -> Part:
            before = time.perf_counter()
            answers = self._harness.answers(split, self.models.candidate, subset, shard)
            own = self._own_scores(split) if shard.number == 0 else None
            costs = self._costs(time.perf_counter() - before)
            return Part(shard, answers, costs, fingerprint, time.perf_counter() - started, own)

        return self._of_merge(recipe, score, quantized)

    def join(self, split: Split, subset: Subset | None, parts: Sequence[Part]) -> Evaluation:
        """The evaluation that follows from all its shards, in any order. No model is needed for it.

        split, subset: as in `evaluate`.
        parts: what workers said to the shards.
        """
        started = time.perf_counter()
        fingerprints = sorted({part.fingerprint for part in parts if part.fingerprint is not None})
        if len(fingerprints) > 1:
            return failure(f"workers made different weights of it (fingerprints {', '.join(fingerprints)})")
        try:
            scores = self._harness.scores(split, subset, [(part.shard, part.answers) for part in parts])
        except CandidateFailed as error:
            return failure(str(error), fingerprints[0])
        except InputError:
            raise
        except Exception as error:
            return failure(first_line(error), fingerprints[0])
        own: Mapping[str, OwnScore] = next((part.own for part in parts if part.own is not None), {})
        own_outcomes = {name: said.outcomes for name, said in own.items() if said.outcomes is not None}
        return Evaluation(
            scores={**scores.scores, **_joined_costs(parts), **{name: said.score for name, said in own.items()}},
            outcomes={**scores.outcomes, **own_outcomes},
            items=scores.items + sum(said.items for said in own.values()),
            fingerprint=fingerprints[0],
            seconds=sum(part.seconds for part in parts) + time.perf_counter() - started,
            truncated=scores.truncated,
        )

    def descend(self, recipe: Recipe, descent: Descent) -> Gradient | Evaluation:
        """The gradient of a recipe's loss on a shard of a mini-batch; a failed evaluation where there is none.

        recipe: the candidate's.
        descent: the mini-batch, and which shard of it.
        Raises WorkerPoisoned and InputError as `evaluate` does.
        """
        started = time.perf_counter()

        def follow(fingerprint: str) -> Gradient:
            with self.models.following(descent.wanted) as followed, self._layers_again():
                losses = self._harness.descend(self.models.candidate, descent)
            slopes = followed.totals()
            if not all(map(math.isfinite, slopes.values())):
                raise CandidateFailed("the gradient is not finite")
            return Gradient(losses, slopes, fingerprint, time.perf_counter() - started)

        return self._of_merge(recipe, follow)

    def measure(self, kind: Kind, reference: str) -> Measured:
        """Statistics of a model, measured and written into the run's folder unless they lie there already.

        kind: the kind of statistics; those of `JOINT` are of all models together.
        reference: the model's.
        Raises InputError where there is nothing to measure on, or where the values of those that lie there have
        changed, and WorkFailed where they are not finite or cannot be written.
        """
        started, held = time.perf_counter(), self._kept(kind, reference)
        name = held.folder.name if held is not None else self._measured(kind, self._measured_with(kind, reference))
        return Measured(name, time.perf_counter() - started)

    def _kept(self, kind: Kind, reference: str) -> Stored | None:
        """What lies in the run's folder of what the config asks for; None where it was not measured yet."""
        subject = self._subject(kind, self._measured_with(kind, reference))
        return self._shelf.look(kind, reference, self._sources, subject, _numerics())

    def _measured_with(self, kind: Kind, reference: str) -> list[str]:
        """The models whose statistics are measured at once, a model's among them."""
        return [reference] if kind not in JOINT else list(self._config.models.values())

    def _measured(self, kind: Kind, models: list[str]) -> str:
        """Measures statistics, and returns the name of their folder."""
        assert self._folder is not None
        calibrated = kind not in ("outputs", "row_weights")
        calibrations = [self._calibration(model) for model in models] if calibrated else []
        self._held = None
        self.models.materialize(single(models[0]))
        model, naming, batch_size = self.models.model, self._naming, self._config.evaluation.batch_size
        if kind == "merged_grams":
            recipe = Recipe(
                merge_method="regmean_plus",
                base_model=self._config.base,
                models=tuple(Source(model=model, parameters={"weight": 1.0}) for model in models),
                parameters={"alpha": self._alpha},
            )
            measured = measuring.merged_inputs(self.models, recipe, naming, calibrations, batch_size)
        elif kind == "row_weights":
            learned = self._config.rows or RowsConfig()
            measured = row_weights(self.models, self._config.base, models, partial(self._loss, learned), learned)
        elif kind == "outputs":
            measured = measuring.outputs(model, self._harness.compared_rows, batch_size)
        elif kind == "fisher":
            drawn = self._config.statistics.labels == "drawn"
            measured = measuring.fisher(model, naming, calibrations[0], drawn)
        else:
            measured = measuring.inputs(kind, model, naming, calibrations[0], batch_size)
        notes = {
            "models": [self._sources[model].identity for model in models],
            "references": models,
            "measured": self._settings(kind, models),
            "versions": _numerics(),
        }
        with self._layers_again() if kind in ("fisher", "row_weights") else nullcontext():
            return measuring.store(self._folder, kind, self._subject(kind, models), notes, measured)

    def _loss(self, settings: RowsConfig, number: int, backward: bool) -> float:
        """The weighted loss of the candidate in memory on a mini-batch. Raises WorkFailed where it is not finite.

        settings: how large a mini-batch is.
        number: which mini-batch it is.
        backward: whether the backward pass runs, too.
        """
        weights = self._config.loss_weights
        wanted = ("weight",) if backward else ()
        descent = Descent(_ROWS_FROM + number, settings.share, 0, 1, tuple(weights.items()), wanted)
        try:
            losses = self._harness.descend(self.models.candidate, descent)
        except CandidateFailed as error:
            raise WorkFailed(f"row weights: {error}.") from None
        return sum(weights[name] * loss for name, loss in losses.items())

    def _subject(self, kind: Kind, models: Sequence[str]) -> str:
        return subject(kind, [self._sources[model].identity for model in models], self._settings(kind, models))

    def _settings(self, kind: Kind, models: Sequence[str]) -> dict[str, Any]:
        """What statistics depend on besides the models that are measured."""
        if kind == "outputs":
            return {"items": digest_of(self._harness.compared_rows), "dtype": self._config.evaluation.dtype}
        if kind == "row_weights":
            return {
                "base": self._sources.base.identity,
                "items": self._harness.learned_digest,
                "weights": self._config.loss_weights,
                "rows": (self._config.rows or RowsConfig()).model_dump(),
                "dtype": self._config.evaluation.dtype,
                "loss": self._config.optimizer.learning.loss,
                "seed": self._config.items.seed,
            }
        settings: dict[str, Any] = {
            "items": [self._calibration(model).digest for model in models],
            "dtype": self._config.evaluation.dtype,
        }
        settings |= {"labels": self._config.statistics.labels} if kind == "fisher" else {}
        settings |= {"base": self._sources.base.identity, "alpha": self._alpha} if kind == "merged_grams" else {}
        return settings

    def _calibration(self, reference: str) -> Calibration:
        if reference not in self._calibrations:
            names = {model: name for name, model in self._config.models.items()}
            self._calibrations[reference] = self._harness.calibration(names.get(reference, "base"))
        return self._calibrations[reference]

    @property
    def _alpha(self) -> float:
        """The alpha of RegMean++ with which layers are merged before those behind them are measured."""
        space = self._config.space.merging
        change = space.parameters.get("regmean_plus", {}).get("alpha") if space is not None else None
        given = [] if change is None else [change.fixed, change.start]
        return next((value for value in given if value is not None), float(methods.OFF_DIAGONAL.default or 0.0))

    @property
    def _naming(self) -> Naming:
        return naming_of(self.models.model.config, Path(self.models.model.config.name_or_path))

    def _statistics(self, kind: Kind, reference: str) -> Readable:
        """What was measured of a model. In a run it is what the config asks for, and else what a recipe names."""
        if (kind, reference) not in self._found:
            held = self._kept(kind, reference) if self._folder is not None else None
            self._found[kind, reference] = held or self._shelf.find(kind, reference, self._sources)
        return self._found[kind, reference]

    def _of_merge(self, recipe: Recipe, work: Callable[[str], T], quantized: bool = False) -> T | Evaluation:
        """What some work on a recipe's merge returns; a failed evaluation where the merge or the work fails. A merge
        that is in memory is not made again.

        recipe: the candidate's.
        work: is given the fingerprint of the merge, which is in memory.
        quantized: whether the merge is quantized.
        Raises WorkerPoisoned and InputError as `evaluate` does.
        """
        fingerprint = None
        try:
            fingerprint = self._materialized(recipe, quantized)
            return work(fingerprint)
        except CandidateFailed as error:
            return failure(str(error), fingerprint)
        except (InputError, WorkFailed):
            raise
        except Exception as error:
            self._check_alive(error)
            return failure(first_line(error), fingerprint)

    def _materialized(self, recipe: Recipe, quantized: bool) -> str:
        """The fingerprint of a recipe's merge, which is in memory afterwards, quantized if asked."""
        if self._held is None or self._held[:2] != (recipe, quantized):
            self._held = None  # until the merge is whole
            self._held = recipe, quantized, self.models.materialize(recipe, quantized)
        return self._held[2]

    def _layers_again(self) -> AbstractContextManager[None]:
        """A context in which layers are computed again on the way back, where the config asks for it."""
        return checkpointed(self.models.candidate) if self._checkpointing else nullcontext()

    def _own_scores(self, split: Split) -> dict[str, OwnScore] | None:
        """What the user's own functions say of the candidate in memory; None where there are none."""
        if self._own is None:
            return None
        try:
            return self._own.measure(self.models.candidate, self._tokenizer, split, self._harness.own_items(split))
        except CandidateFailed as error:
            self._check_alive(error.__cause__ or error)
            raise

    def _costs(self, seconds: float) -> dict[str, float]:
        """The costs of the candidate in memory, by name, as far as the objectives ask for them.

        seconds: how long its evaluation took.
        """
        return {cost: measure(self.models.candidate, seconds) for cost, measure in self._asked.items()}

    def _check_alive(self, error: BaseException) -> None:
        """Frees what a failed evaluation may have left on a GPU. Raises WorkerPoisoned where this fails too."""
        try:
            empty_cache(self.models.devices)
            synchronize(self.models.devices)
        except Exception:
            raise WorkerPoisoned(
                f"the GPU computes nothing any more ({first_line(error)}); resume in a new process."
            ) from None


def _shelf_of_run(folder: Path | None, names: Names | None) -> Shelf:
    """Where the statistics of a run are looked for.

    folder: the run's; None where there is none.
    names: see `Worker`.
    """
    return Shelf([folder] if folder else [], names, again="give the command again, which measures it")


def _numerics() -> dict[str, str]:
    """The versions of what computes statistics."""
    return {name: version for name, version in versions().items() if name in ("torch", "transformers", "lm_eval")}


def _joined_costs(parts: Sequence[Part]) -> dict[str, float]:
    """The costs of a candidate: those that depend on its items are summed up, and all others are the same in all
    parts."""
    measured = [part.costs for part in parts if part.fingerprint is not None]
    return {
        cost: sum(costs[cost] for costs in measured) if COSTS[cost].of_items else value
        for cost, value in measured[0].items()
    }


def _resident_models(config: SearchConfig, models: Models, head_apart: bool, statistics: Find) -> ResidentModels:
    """The models of a search with their weights. `statistics` finds what was measured of them."""
    evaluation, device = config.evaluation, resolve_device(config.evaluation.device)
    count = count_gpus(config, device)
    used = devices_of(device, count)[0]
    placed = resolve(
        evaluation.sources,
        evaluation.fields,
        evaluation.adapters,
        models,
        evaluation.dtype,
        used,
        workers_of_a_node(config),
    )
    return ResidentModels(
        models,
        device,
        evaluation.dtype,
        evaluation.compile is True,
        count=count,
        head_apart=head_apart,
        sources=placed.sources,
        fields=placed.fields,
        adapters=placed.adapters,
        quantized=bool(evaluation.quantize),
        statistics=statistics,
        vocabulary=vocabulary.of_search(config, models),
    )


def rehearsed_models(config: SearchConfig, models: Models) -> RehearsedModels:
    """The models of a search without data, on one device. Where they live is as the config says; `auto` is the most
    memory.

    config: the search's, resolved.
    models: the models that recipes may name.
    """
    evaluation = config.evaluation
    return RehearsedModels(
        models,
        evaluation.device,
        evaluation.dtype,
        evaluation.compile is True,
        sources="device" if evaluation.sources == "auto" else evaluation.sources,
        fields="kept" if evaluation.fields == "auto" else evaluation.fields,
        adapters="expanded" if evaluation.adapters == "auto" else evaluation.adapters,
        quantized=bool(evaluation.quantize),
        vocabulary=vocabulary.of_search(config, models),
    )


def workers_of_a_node(config: SearchConfig) -> int:
    """How many workers share a node, as far as the config and this machine say it."""
    if config.workers.pool == "local":
        return 1
    device, each = torch.device(config.evaluation.device), int(config.workers.num_gpus or 1)
    places = device_count(device.type) // each if is_accelerator(device) else os.cpu_count()
    return config.workers.count or places or 1


def base_tokenizer(config: SearchConfig, base: Model) -> Any:
    """The base model's tokenizer.

    config: the search's.
    base: the base model.
    Raises InputError where it has none, or where the tokenizer lacks the chat template that the config asks for.
    """
    with naming("base"):
        tokenizer = read_tokenizer(base.folder)
    if config.evaluation.apply_chat_template and tokenizer.chat_template is None:
        raise InputError(
            f"evaluation.apply_chat_template is true, but the tokenizer in {base.folder} has no chat template; "
            "set it to false, or use a base that has one."
        )
    return tokenizer
