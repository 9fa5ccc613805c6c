"""Worker: holds the models, merges a recipe in place, scores it. Knows nothing of Ray or of the search around it."""

import time
from collections.abc import Iterable

import torch

from evomerge.candidate import Evaluation, Split, failure
from evomerge.config import SearchConfig
from evomerge.errors import CandidateFailed, InputError
from evomerge.evaluation.harness import Harness
from evomerge.merging.materialize import ResidentModels
from evomerge.merging.sources import locate
from evomerge.recipe import Recipe


class Worker:
    """One process's models and prepared tasks. Raises InputError where they cannot be loaded."""

    def __init__(self, config: SearchConfig, references: Iterable[str] | None = None) -> None:
        """references: the models that recipes may name; by default the base and the models of the config."""
        from transformers import AutoTokenizer

        torch.set_num_threads(config.evaluation.threads)
        wanted = tuple(references) if references is not None else (config.base, *config.models.values())
        skeleton = locate(config.base)
        device = resolve_device(config.evaluation.device)
        folders = {reference: locate(reference) for reference in dict.fromkeys(wanted)}
        self.models = ResidentModels(folders, skeleton, device, config.evaluation.dtype)
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(skeleton), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise InputError(f"{skeleton}: the tokenizer cannot be loaded ({reason}).") from None
        self._harness = Harness(config, self.models.model, tokenizer)

    def evaluate(self, recipe: Recipe, split: Split) -> Evaluation:
        """The evaluation of a recipe; whatever goes wrong with it is recorded there, not raised."""
        started = time.perf_counter()
        fingerprint = None
        try:
            fingerprint = self.models.materialize(recipe)
            scores = self._harness.evaluate(split)
        except CandidateFailed as error:
            return failure(str(error), fingerprint)
        except InputError:
            raise
        except Exception as error:
            return failure(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", fingerprint)
        return Evaluation(
            scores=dict(scores.scores),
            outcomes=dict(scores.outcomes),
            items=scores.items,
            fingerprint=fingerprint,
            seconds=time.perf_counter() - started,
        )


def resolve_device(name: str) -> str:
    """The device that `auto` stands for here; InputError for one that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"evaluation.device is '{name}'; use auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"evaluation.device is '{name}', but torch sees no CUDA device here; use auto or cpu.")
    return name
