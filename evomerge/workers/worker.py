"""Worker: holds the models, merges recipes in place and scores them. It knows nothing of Ray or of the search."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

from evomerge.candidate import Descent, Evaluation, Gradient, Part, Shard, Subset, failure
from evomerge.config.base import Split
from evomerge.config.search import SearchConfig
from evomerge.config.tables import COSTS, imported
from evomerge.devices import count_gpus, devices_of, empty_cache, resolve_device, synchronize
from evomerge.errors import CandidateFailed, InputError, WorkerPoisoned, first_line, naming
from evomerge.evaluation.engine import Engine
from evomerge.evaluation.harness import WHOLE, Harness
from evomerge.evaluation.loading import Target
from evomerge.merging.methods import METHODS
from evomerge.merging.naming import named_weights
from evomerge.merging.resident.gradients import checkpointed
from evomerge.merging.resident.models import ResidentModels
from evomerge.merging.resident.sources import Choice, resolve
from evomerge.merging.sources.models import Model, Models, models_of
from evomerge.merging.sources.tokenizers import read_tokenizer
from evomerge.recipe import Recipe
from evomerge.seen import Digests

T = TypeVar("T")


class Worker:
    """The models and prepared tasks of one process."""

    def __init__(
        self,
        config: SearchConfig,
        models: Models | None = None,
        targets: Mapping[str, Target] | None = None,
        *,
        rehearsal: bool = False,
        seen: Digests = frozenset(),
        head_apart: bool = False,
    ) -> None:
        """Loads the models and prepares the tasks.

        config: the search's, resolved.
        models: the models that recipes may name, where their headers are read already; by default they are read here.
        targets: the tasks, where they are loaded already; by default they are loaded here.
        rehearsal: whether weights are neither read nor computed, for `rehearse`.
        seen: digests of items that must not be held out, besides those that were seen when the models were made.
        head_apart: see ResidentModels.
        Raises InputError where the models or tasks cannot be loaded.
        """
        torch.set_num_threads(config.evaluation.threads)
        models = models or models_of(config)
        device = config.evaluation.device if rehearsal else resolve_device(config.evaluation.device)
        count = 1 if rehearsal else count_gpus(config, device)
        evaluation = config.evaluation
        placed = _placed(config, models, device, count, rehearsal)
        self.models = ResidentModels(
            models,
            device,
            evaluation.dtype,
            evaluation.compile is True,
            rehearsal,
            count,
            head_apart,
            sources=placed.sources,
            fields=placed.fields,
            adapters=placed.adapters,
            quantized=bool(evaluation.quantize),
        )
        engine = (
            Engine(config.evaluation, models.base.folder, self.models.model, named_weights(self.models.model))
            if config.evaluation.backend == "vllm" and not rehearsal
            else None
        )
        tokenizer = base_tokenizer(config, models.base)
        self._harness = Harness(config, self.models.model, tokenizer, engine, seen | models.seen, targets)
        costs = [objective.cost for objective in config.objectives if objective.cost is not None]
        self._learns = config.optimizer.follows_gradients
        self._checkpointing = config.optimizer.learning.checkpointing
        self._reports = bool(config.report)  # held-out items then have further tasks, which may take more memory
        self._asked = {cost: imported(COSTS[cost].measure) for cost in costs}
        self._held: tuple[Recipe, bool, str] | None = None  # the recipe whose merge is in memory, with its fingerprint
        for split in config.splits:  # all of them now, so that an item that cannot be scored shows before the search
            self._harness.prepare(split)
        if engine is not None:
            engine.start(self._harness.texts)

    def left_out(self, split: Split) -> int:
        """How many items of a split were left out because a search has seen them."""
        return self._harness.left_out(split)

    def rehearse(self, recipe: Recipe) -> None:
        """Merges and scores a recipe on the meta device, where nothing is computed, so that memory can be counted.

        Where the search follows gradients, one is computed, too.
        """
        self._held = None
        self.models.rehearse(recipe)
        self._harness.rehearse("heldout" if self._reports else "search", self.models.candidate)
        wanted = METHODS[recipe.merge_method].slopes
        if self._learns and wanted:
            with self.models.following(wanted), self._layers_again():
                self._harness.rehearse_descent(self.models.candidate)

    def evaluate(
        self, recipe: Recipe, split: Split, subset: Subset | None = None, quantized: bool = False
    ) -> Evaluation:
        """The evaluation of a recipe. Failures of the candidate are recorded in it, not raised.

        recipe: the candidate's.
        split: the split to score it on.
        subset: the part of the search items to score it on; None for all items.
        quantized: whether the merge is quantized before it is scored.
        Raises WorkerPoisoned where the GPU can compute nothing any more or the engine has ended, and InputError for a
        recipe that does not fit the models.
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
            costs = self._costs(time.perf_counter() - before)
            return Part(shard, answers, costs, fingerprint, time.perf_counter() - started)

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
        return Evaluation(
            scores={**scores.scores, **_joined_costs(parts)},
            outcomes=dict(scores.outcomes),
            items=scores.items,
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
        except (InputError, WorkerPoisoned):
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

    def _costs(self, seconds: float) -> dict[str, float]:
        """The costs of the candidate in memory, by name, as far as the objectives ask for them.

        seconds: how long its evaluation took.
        """
        return {cost: measure(self.models.candidate, seconds) for cost, measure in self._asked.items()}

    def _check_alive(self, error: Exception) -> None:
        """Frees what a failed evaluation may have left on a GPU. Raises WorkerPoisoned where this fails too."""
        try:
            empty_cache(self.models.devices)
            synchronize(self.models.devices)
        except Exception:
            raise WorkerPoisoned(
                f"the GPU computes nothing any more ({first_line(error)}); resume in a new process."
            ) from None


def _joined_costs(parts: Sequence[Part]) -> dict[str, float]:
    """The costs of a candidate: those that depend on its items are summed up, and all others are the same in all
    parts."""
    measured = [part.costs for part in parts if part.fingerprint is not None]
    return {
        cost: sum(costs[cost] for costs in measured) if COSTS[cost].of_items else value
        for cost, value in measured[0].items()
    }


def _placed(config: SearchConfig, models: Models, device: str, count: int, rehearsal: bool) -> Choice:
    """Where the models live, and what is kept of them. A rehearsal takes `auto` for the most memory."""
    wanted = config.evaluation
    if rehearsal:
        return Choice(
            "device" if wanted.sources == "auto" else wanted.sources,
            "kept" if wanted.fields == "auto" else wanted.fields,
            "expanded" if wanted.adapters == "auto" else wanted.adapters,
        )
    workers = 1 if config.workers.pool == "local" else config.workers.count or os.cpu_count() or 1
    used = devices_of(device, count)
    return resolve(wanted.sources, wanted.fields, wanted.adapters, models, wanted.dtype, used[0], workers)


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
