"""How far a search is: its stage and its generation; and how fast it goes, by the end of its log."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from evomerge.candidate import Candidate, is_learned
from evomerge.config.running import OptimizerConfig, StageConfig
from evomerge.config.tables import LEARNED

_WINDOW = 40
_TAIL_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a search goes.

    rate: evaluations per minute; None where the log does not say.
    seconds_left: seconds until the last evaluation; None likewise.
    phrase: rate and time left as people read them; empty likewise.
    """

    rate: float | None = None
    seconds_left: int | None = None
    phrase: str = ""


def pace(directory: Path, left: int) -> Pace:
    """The pace of a run.

    directory: the run's.
    left: how many evaluations are left.
    """
    return pace_of(_recent(directory / "log.jsonl"), left)


def pace_of(times: Sequence[float], left: int) -> Pace:
    """The pace by the times of the last evaluations.

    times: when these finished, in seconds, ascending.
    left: how many evaluations are left.
    """
    if len(times) < 2 or times[-1] <= times[0]:
        return Pace()
    rate = (len(times) - 1) / (times[-1] - times[0])
    seconds = max(0, left) / rate
    phrase = f"{_frequency(rate)}, {clock(seconds)} left"
    return Pace(round(rate * 60, 1), round(seconds), phrase)


def _frequency(rate: float) -> str:
    """A rate per second, as people read it."""
    return f"{rate * 60:.0f}/min" if rate * 60 >= 10 else f"{rate * 3600:.0f}/h"


def clock(seconds: float) -> str:
    """A time as on a clock: minutes and seconds, after an hour with hours."""
    whole = int(seconds)
    minutes = f"{whole // 60 % 60}:{whole % 60:02d}"
    return minutes if whole < 3600 else f"{whole // 3600}:{minutes:0>5}"


def phase(candidates: Sequence[Candidate], steps: int, optimizer: OptimizerConfig) -> str:
    """Where a search is, in words: its stage, where there are several, and its step or its generation. Empty before the
    first.

    candidates: its search candidates so far, in its order.
    steps: how many steps along gradients it has taken.
    optimizer: its settings, resolved.
    """
    if not candidates and not steps:
        return ""
    stages = optimizer.stages
    number = 1 + sum(1 for _ in stage_starts(candidates, stages))
    name = (stages[number - 1].name if stages else None) or optimizer.name
    stage = f"stage {number} of {len(stages)}, {name}" if len(stages) > 1 else name
    return f"{stage}, step {steps}" if name == LEARNED else f"{stage}, generation {candidates[-1].generation}"


def stage_starts(candidates: Sequence[Candidate], stages: Sequence[StageConfig]) -> Iterator[tuple[int, int]]:
    """The index of the first candidate of every stage but the first, with the number of the stage, from 1.

    A stage ends with the first generation that completes its evaluations, and a stage that follows gradients ends with
    the last candidate that they have led to.

    candidates: the search's, in its order.
    stages: its stages.
    """
    number, asked = 0, 0
    for index, candidate in enumerate(candidates):
        if number >= len(stages) - 1:
            return
        if index == 0 or candidate.generation == candidates[index - 1].generation:
            over = stages[number].name == LEARNED and not is_learned(candidate)
        else:
            wanted = stages[number].evaluations
            over = not is_learned(candidate) if wanted is None else asked >= wanted
        if over:
            number, asked = number + 1, 0
            yield index, number + 1
        asked += 1


def _recent(log: Path) -> list[float]:
    """The times at which the last candidates were evaluated on search items, ascending."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = stream.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    times: dict[str, float] = {}
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # the first line of the tail is cut off, and a killed process may have cut off the last line
        if event.get("event") == "started":
            times.clear()
        elif event.get("event") == "evaluated" and event.get("split") in ("search", "subset"):
            times.setdefault(str(event["id"]), float(event["time"]))  # only the first, of a subset and all items
    return sorted(times.values())[-_WINDOW:]
