"""How fast a running search goes, read off the end of its log."""

import json
from pathlib import Path
from typing import Any

_WINDOW = 40
_TAIL_BYTES = 65536


def pace(directory: Path, status: dict[str, Any]) -> dict[str, Any]:
    """Evaluations a minute and seconds left (None where the log does not say), with a phrase for people."""
    times = _recent(directory / "log.jsonl")
    if len(times) < 2 or times[-1] <= times[0]:
        return {"rate": None, "seconds_left": None}
    rate = (len(times) - 1) / (times[-1] - times[0])
    done = status["evaluations"] + status["controls"]["done"]
    left = (status["budget"] + status["controls"]["total"] - done) / rate
    return {
        "rate": round(rate * 60, 1),
        "seconds_left": round(left),
        "pace": f"{rate * 60:.0f}/min, {int(left) // 60}:{int(left) % 60:02d} left",
    }


def _recent(log: Path) -> list[float]:
    """Times of the last evaluations on search items."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = stream.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    times: list[float] = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # the first line of the tail is cut, and a killed process may have cut the last
        if event.get("event") == "started":
            times.clear()
        elif event.get("event") == "evaluated" and event.get("split") == "search":
            times.append(float(event["time"]))
    return times[-_WINDOW:]
