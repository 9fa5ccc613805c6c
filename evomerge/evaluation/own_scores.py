"""Scores that functions of the user's own compute, in the workers.

A function gets the model, the tokenizer and a split, and returns a number or one number per item. It only reads: the
weights of the model must be as before when it returns. Source files are run as modules of their own, so a function uses
what is installed and what stands in its own file, and nothing beside it.
"""

import contextlib
import copy
import inspect
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from evomerge.config.base import Split
from evomerge.config.scoring import ObjectiveConfig
from evomerge.config.search import SearchConfig
from evomerge.devices import seeded
from evomerge.errors import CandidateFailed, InputError, WorkFailed, first_line
from evomerge.evaluation.own_files import OwnFiles, check_call, documents, source_file
from evomerge.outcomes import Outcomes
from evomerge.randomness import counter_rng

Item = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class GivenSplit:
    """What a function of the user's own is told of the split that it scores.

    name: `search`, `selection` or `heldout`.
    seed: for random numbers; the same for all candidates, and another one for every split and score.
    items: the split's items, as they stand in the file; empty where the score has no file of items.
    """

    name: Split
    seed: int
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class OwnScore:
    """What a function of the user's own said of a model.

    score: the number, or the mean of the numbers of the items.
    outcomes: the items' numbers; None where there is one number for all.
    items: how many items the function was given.
    """

    score: float
    outcomes: Outcomes | None
    items: int


class OwnTask:
    """The items of a score in the form in which tasks are divided among the splits (`items.Division`)."""

    OUTPUT_TYPE = "own"

    def __init__(self, name: str, items: Sequence[Item]) -> None:
        """name: the score's.
        items: all of its items.
        """
        splits = dict.fromkeys(("training_split", "validation_split", "metadata", "doc_to_choice"))
        self.config = SimpleNamespace(task=name, test_split="items", num_fewshot=0, **splits)
        self._items = items

    def has_validation_docs(self) -> bool:
        """False: all items are in one split, which is divided."""
        return False

    def has_test_docs(self) -> bool:
        """True, see `has_validation_docs`."""
        return True

    def test_docs(self) -> Sequence[Item]:
        """All items."""
        return self._items

    def doc_to_text(self, item: Item) -> str:
        """An item as people read it."""
        return json.dumps(item, ensure_ascii=False)

    def doc_to_target(self, _item: Item) -> str:
        """Nothing: what the right answer is, only the function knows."""
        return ""


@dataclass(frozen=True, slots=True)
class OwnItems:
    """The items of a search's own scores, of those that have any.

    searched: by the name of the score, what the search sees a part of.
    reported: the same for scores that are only reported.
    """

    searched: Mapping[str, OwnTask] = field(default_factory=dict)
    reported: Mapping[str, OwnTask] = field(default_factory=dict)

    @classmethod
    def of(cls, config: SearchConfig, files: Mapping[str, OwnFiles]) -> "OwnItems":
        """The items in the files of a search's own scores.

        Raises InputError where a file holds no items.
        """
        measured = {metric.name for metric in config.measured}
        tasks = {
            score.name: OwnTask(score.name, documents(files[score.name], score.items))
            for score in config.own
            if score.items is not None
        }
        return cls(
            {name: task for name, task in tasks.items() if name in measured},
            {name: task for name, task in tasks.items() if name not in measured},
        )


class OwnScores:
    """The functions of a search's own scores, loaded."""

    def __init__(self, config: SearchConfig, files: Mapping[str, OwnFiles]) -> None:
        """Runs the source files, each once, and finds the functions.

        config: the search's.
        files: those of its own scores.
        Raises InputError for a file that cannot be run, and a function that cannot be called as it will be.
        """
        self._config = config
        modules: dict[bytes, ModuleType] = {}
        self._functions: dict[str, Callable[..., Any]] = {}
        self._paths: dict[str, str] = {}
        for score in config.own:
            own = files[score.name]
            if own.source not in modules:
                modules[own.source] = _module(own, source_file(score), f"evomerge_own_{len(modules)}_{score.digest}")
            self._functions[score.name] = _function(own, modules[own.source], score)
            self._paths[score.name] = str(modules[own.source].__file__)

    def measure(
        self, model: Any, tokenizer: Any, split: Split, items: Mapping[str, Sequence[Item]]
    ) -> dict[str, OwnScore]:
        """The scores of a model on a split, by name; on held-out items those that are only reported, too.

        model: the candidate.
        tokenizer: the base's.
        split: the split.
        items: its items, by the name of the score.
        Raises CandidateFailed where a function fails or returns what is not finite, WorkFailed where it reports that
        something outside does not answer (OSError), and InputError where it returns no numbers or changes the model.
        """
        wanted = self._config.reported if split == "heldout" else self._config.measured
        return {
            score.name: self._score(score, model, tokenizer, split, tuple(items.get(score.name, ())))
            for score in wanted
            if score.python is not None
        }

    def _score(
        self, score: ObjectiveConfig, model: Any, tokenizer: Any, split: Split, items: tuple[Item, ...]
    ) -> OwnScore:
        seed = int(counter_rng(self._config.seed, "own score", score.name, split).integers(2**31))
        given = GivenSplit(split, seed, copy.deepcopy(items))
        before, hooks = _versions(model), _hooks(model)
        try:
            with torch.no_grad(), _from_seed(model, seed), contextlib.redirect_stdout(sys.stderr):
                value = self._functions[score.name](model, tokenizer, given, **copy.deepcopy(score.arguments))
        except OSError as error:
            raise WorkFailed(
                f"{score.name}: what its function asks for does not answer ({first_line(error).rstrip('.')}); nothing "
                "was lost: mend it, then resume."
            ) from None
        except (Exception, SystemExit) as error:  # a library may well exit where something is missing
            raise CandidateFailed(
                f"{score.name}: {first_line(error).rstrip('.')}{_line(error, self._paths[score.name])}"
            ) from error
        model.eval()
        if _versions(model) != before:
            raise InputError(
                f"{score.name}: its function has changed the model's weights, which other candidates may share; it may "
                "only read them."
            )
        if _hooks(model) != hooks:
            raise InputError(
                f"{score.name}: its function has left hooks on the model, through which other candidates would run; "
                "remove them before it returns."
            )
        return _checked(score.name, value, len(items))


def _module(own: OwnFiles, path: str, name: str) -> ModuleType:
    """A source file, run as a module that has its own name."""
    module = ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module  # where dataclasses and pickles look for it
    try:
        exec(compile(own.source, path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise InputError(
            f"{own.key}.python: {path} cannot be run ({first_line(error).rstrip('.')}); correct it."
        ) from None
    return module


def _function(own: OwnFiles, module: ModuleType, score: ObjectiveConfig) -> Callable[..., Any]:
    function: Callable[..., Any] | None = getattr(module, score.function, None)
    if function is None or not callable(function):
        raise InputError(f"{own.key}.python: {score.function} in {module.__file__} is no function; name one.")
    with contextlib.suppress(ValueError):  # some callables, such as built-in ones, do not say what they take
        check_call(own.key, score, inspect.signature(function))
    return function


@contextlib.contextmanager
def _from_seed(model: Any, seed: int) -> Iterator[None]:
    """A context in which all global generators start from a seed. Afterwards they go on as before."""
    plain, arrays = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        with seeded([model.device], seed):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)


def _versions(model: Any) -> list[int]:
    """A number for each weight of a model, which rises whenever the weight is written to."""
    return [weight._version for weight in model.parameters() if not weight.is_inference()]


def _hooks(model: Any) -> int:
    """How many hooks a model has that run when it does."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def _line(error: BaseException, path: str) -> str:
    """The line of a source file at which a function failed, in a phrase."""
    lines, trace = [], error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f" (line {lines[-1]})" if lines else ""


def _checked(name: str, value: Any, count: int) -> OwnScore:
    """A function's answer as a score.

    count: how many items it was given.
    """
    numbers = _numbers(value)
    if numbers is None or (isinstance(numbers, list) and len(numbers) != count) or numbers == []:
        expected = f"a number, or {count} numbers, one per item" if count else "a number, as it has no items"
        got = f"{len(numbers)} numbers" if isinstance(numbers, list) else type(value).__name__
        raise InputError(f"{name}: its function returned {got}, expected {expected}; correct the function.")
    single = [numbers] if isinstance(numbers, float) else numbers
    if not all(map(math.isfinite, single)):
        raise CandidateFailed(f"{name}: its function returned {next(x for x in single if not math.isfinite(x))}")
    outcomes = None if isinstance(numbers, float) else Outcomes.of(numbers)
    return OwnScore(math.fsum(single) / len(single), outcomes, count)


def _numbers(value: Any) -> float | list[float] | None:
    """A number, or several; None for anything else."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, list | tuple):
        single = [_numbers(one) for one in value]
        return [one for one in single if isinstance(one, float)] if all(isinstance(x, float) for x in single) else None
    return None
