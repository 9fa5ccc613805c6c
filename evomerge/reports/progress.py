"""How fast a running search goes, read from the end of its log."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    phrase = f"{rate * 60:.0f}/min, {int(seconds) // 60}:{int(seconds) % 60:02d} left"
    return Pace(round(rate * 60, 1), round(seconds), phrase)


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
