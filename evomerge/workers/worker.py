"""Worker: holds the models, merges recipes in place and scores them. It knows nothing of Ray or of the search."""

import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

from evomerge.candidate import Descent, Evaluation, Gradient, Subset, failure
from evomerge.config.base import Split
from evomerge.config.search import SearchConfig
from evomerge.config.tables import COSTS, imported
from evomerge.devices import count_gpus, devices_of, empty_cache, resolve_device, synchronize
from evomerge.errors import CandidateFailed, InputError, WorkerPoisoned, first_line, naming
from evomerge.evaluation.engine import Engine
from evomerge.evaluation.harness import Harness
from evomerge.evaluation.loading import Target
from evomerge.merging.methods import METHODS
from evomerge.merging.naming import named_weights
from evomerge.merging.resident.gradients import checkpointed
from evomerge.merging.resident.models import ResidentModels
from evomerge.merging.resident.sources import Kept, Where, resolve
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
        self.models = ResidentModels(
            models,
            device,
            evaluation.dtype,
            evaluation.compile is True,
            rehearsal,
            count,
            head_apart,
            *_placed(config, models, device, count, rehearsal),
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
        self.models.rehearse(recipe)
        self._harness.rehearse("heldout" if self._reports else "search", self.models.candidate)
        wanted = METHODS[recipe.merge_method].slopes
        if self._learns and wanted:
            with self.models.following(wanted), self._layers_again():
                self._harness.rehearse_descent(self.models.candidate)

    def evaluate(self, recipe: Recipe, split: Split, subset: Subset | None = None) -> Evaluation:
        """The evaluation of a recipe. Failures of the candidate are recorded in it, not raised.

        recipe: the candidate's.
        split: the split to score it on.
        subset: the part of the search items to score it on; None for all items.
        Raises WorkerPoisoned where the GPU can compute nothing any more or the engine has ended, and InputError for a
        recipe that does not fit the models.
        """
        started = time.perf_counter()

        def score(fingerprint: str) -> Evaluation:
            before = time.perf_counter()
            scores = self._harness.evaluate(split, self.models.candidate, subset)
            costs = self._costs(time.perf_counter() - before)
            return Evaluation(
                scores={**scores.scores, **costs},
                outcomes=dict(scores.outcomes),
                items=scores.items,
                fingerprint=fingerprint,
                seconds=time.perf_counter() - started,
                truncated=scores.truncated,
            )

        return self._of_merge(recipe, score)

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

    def _of_merge(self, recipe: Recipe, work: Callable[[str], T]) -> T | Evaluation:
        """What some work on a recipe's merge returns; a failed evaluation where the merge or the work fails.

        recipe: the candidate's.
        work: is given the fingerprint of the merge, which is in memory.
        Raises WorkerPoisoned and InputError as `evaluate` does.
        """
        fingerprint = None
        try:
            fingerprint = self.models.materialize(recipe)
            return work(fingerprint)
        except CandidateFailed as error:
            return failure(str(error), fingerprint)
        except (InputError, WorkerPoisoned):
            raise
        except Exception as error:
            self._check_alive(error)
            return failure(first_line(error), fingerprint)

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


def _placed(config: SearchConfig, models: Models, device: str, count: int, rehearsal: bool) -> tuple[Where, Kept]:
    """Where the models live, and whether uniform fields are kept. A rehearsal takes `auto` for the most memory."""
    sources, fields = config.evaluation.sources, config.evaluation.fields
    if rehearsal:
        return "device" if sources == "auto" else sources, "kept" if fields == "auto" else fields
    workers = 1 if config.workers.pool == "local" else config.workers.count or os.cpu_count() or 1
    used = devices_of(device, count)
    chosen = resolve(sources, fields, models, config.evaluation.dtype, used[0], workers)
    return chosen.sources, chosen.fields


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
