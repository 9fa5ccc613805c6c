"""Whether a search works from end to end: its memory, its scores, and a small one of its kind."""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from evomerge.config.search import SearchConfig
from evomerge.devices import is_accelerator, peak_memory, reset_peak_memory
from evomerge.doctor import Finding, Patient
from evomerge.doctor.merges import recipe_in_the_middle
from evomerge.events import unheard
from evomerge.runs import directory as runs
from evomerge.search.controls import count_controls
from evomerge.workers.memory import plan_placements, shortage
from evomerge.workers.worker import Worker

_MORE = 1.1  # times the plan, and a little
_LITTLE = 256 << 20  # bytes, which the allocator keeps
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_ITEMS = 16
_CANDIDATES, _POPULATION = 8, 4


def memory(patient: Patient) -> Iterator[Finding]:
    """What a worker takes while it scores a candidate, beside the plan, and whether all workers fit."""
    prepared = patient.prepared
    chosen = plan_placements(prepared.config, prepared.space, prepared.models, prepared.targets).chosen
    plan, short = chosen.worker, shortage(chosen)
    needed = f"{plan.total / 2**30:.2f} GiB for each worker"
    yield Finding("memory", "this machine", f"room for {needed}", short or "there is", short is None)
    device = torch.device(prepared.config.evaluation.device)
    before = _peak(device, anew=True)
    worker = Worker(prepared.config, prepared.models, prepared.targets)
    worker.evaluate(recipe_in_the_middle(patient), "search", None, bool(prepared.config.evaluation.quantize))
    after = _peak(device)
    if before is None or after is None:
        yield Finding("memory", str(device), "the plan", "this device does not say what it uses", True)
        return
    allowed = _MORE * (plan.total - plan.libraries) + _LITTLE  # as libraries are loaded already
    yield Finding(
        "memory",
        f"a worker on {device}",
        f"at most {allowed / 2**30:.2f} GiB",
        f"{(after - before) / 2**30:.2f} GiB",
        after - before <= allowed,
    )


def _peak(device: torch.device, anew: bool = False) -> int | None:
    """The most memory that was used on a device, or by this process; None where nothing says it.

    anew: whether to count from now on, and so what is used now.
    """
    if is_accelerator(device):
        if anew:
            reset_peak_memory(device)
        return peak_memory(device)
    if not _STATUS.exists():
        return None
    if anew and os.access(_RESET, os.W_OK):
        _RESET.write_text("5")
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def scores(patient: Patient) -> Iterator[Finding]:
    """The scores of a candidate, from two workers that have nothing in common but the search."""
    prepared, recipe = patient.prepared, recipe_in_the_middle(patient)
    found = []
    for _ in range(2):
        evaluation = Worker(prepared.config, prepared.models, prepared.targets).evaluate(recipe, "search")
        told = ", ".join(f"{name} {score!r}" for name, score in (evaluation.scores or {}).items())
        found.append((evaluation.fingerprint, told or str(evaluation.error), evaluation.outcomes))
        if evaluation.failed:
            break
    timed = any(objective.cost == "seconds" for objective in prepared.config.objectives)
    equal = len(found) == 2 and found[0][:: 2 if timed else 1] == found[1][:: 2 if timed else 1]
    yield Finding("scores", "two runs", found[0][1] if len(found) == 2 else "scores", found[-1][1], equal)


def smoke(patient: Patient) -> Iterator[Finding]:
    """A search of a few candidates with the workers that the search file asks for."""
    config = patient.prepared.config
    with tempfile.TemporaryDirectory() as folder:
        settings = [*patient.overrides, *_small(config)]
        run = runs.start(patient.search, Path(folder) / "run", settings, patient.address, unheard)
        records = run.archive.tried()
        failed = [record for record in records if record.evaluation.failed]
        finished = run.results.finished
    reason = f"; {failed[0].candidate.id} failed: {failed[0].evaluation.error}" if failed else ""
    yield Finding(
        "search",
        f"{config.workers.pool} workers",
        f"{_CANDIDATES + count_controls(run.config)} candidates and controls with scores, and an end",
        f"{len(records) - len(failed)} with scores, {'and an end' if finished else 'but no end'}{reason}",
        not failed and finished,
    )


def _small(config: SearchConfig) -> list[str]:
    """The settings that make a small search of any."""
    items = {name: getattr(config.items, name) for name in ("search", "heldout")}
    return [
        f"optimizer={json.dumps({'name': 'random_search', 'evaluations': _CANDIDATES, 'population': _POPULATION})}",
        "controls={}",
        "storage=null",
        *(f"items.{name}={min(count or _ITEMS, _ITEMS)}" for name, count in items.items()),
    ]
