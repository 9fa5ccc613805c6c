"""How fast a running search goes, read off the end of its log."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_WINDOW = 40
_TAIL_BYTES = 65536


def pace(directory: Path, status: dict[str, Any]) -> dict[str, Any]:
    """Evaluations a minute and seconds left (None where the log does not say), with a phrase for people."""
    done = status["evaluations"] + status["controls"]["done"]
    return pace_of(_recent(directory / "log.jsonl"), status["budget"] + status["controls"]["total"] - done)


def pace_of(times: Sequence[float], left: int) -> dict[str, Any]:
    """The same from the times, in seconds, at which the last evaluations finished, and how many are left."""
    if len(times) < 2 or times[-1] <= times[0]:
        return {"rate": None, "seconds_left": None, "pace": ""}
    rate = (len(times) - 1) / (times[-1] - times[0])
    seconds = max(0, left) / rate
    return {
        "rate": round(rate * 60, 1),
        "seconds_left": round(seconds),
        "pace": f"{rate * 60:.0f}/min, {int(seconds) // 60}:{int(seconds) % 60:02d} left",
    }


def _recent(log: Path) -> list[float]:
    """Times at which the last candidates were evaluated on search items."""
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
            continue  # the first line of the tail is cut, and a killed process may have cut the last
        if event.get("event") == "started":
            times.clear()
        elif event.get("event") == "evaluated" and event.get("split") in ("search", "subset"):
            times.setdefault(str(event["id"]), float(event["time"]))  # once, though on a subset and on all items
    return sorted(times.values())[-_WINDOW:]
