"""Small searches, as documents to be changed before they are written or read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

EVALS = Path(__file__).parents[1] / "evals"

WriteSearch = Callable[..., Path]
REMOVED = ...


def put(document: Any, path: str, value: Any) -> None:
    """Sets (or removes) a dotted key of nested dictionaries and lists."""
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for part in parents:
        document = document.setdefault(part, {}) if isinstance(document, dict) else document[part]
    if value is REMOVED:
        del document[last]
    else:
        document[last] = value


def small_search(**changes: Any) -> dict[str, Any]:
    """A search of seconds over the zoo, with top-level keys replaced (None removes one)."""
    document: dict[str, Any] = {
        "base": "zoo:base",
        "models": {"math": "zoo:math", "lang": "zoo:lang"},
        "tasks": {"paths": [str(EVALS)]},
        "objectives": [{"task": "base_qa"}, {"task": "cross_math_b"}],
        "items": {"search": 24, "heldout": 24},
        "space": {"layer_groups": ["0-1", "2-3", "4-5"]},
        "optimizer": {"evaluations": 20, "population": 8},
        "workers": {"pool": "local"},
    }
    search = {key: value for key, value in (document | changes).items() if value is not None}
    optimizer = search.get("optimizer", {})
    learned = any(stage.get("name") == "learned" for stage in optimizer.get("stages", ()))
    if "name" not in optimizer and not learned:  # `auto` without gradients, which few tests are about
        search["optimizer"] = {"learning": {"steps": 0}, **search.get("optimizer", {})}
    return search


def tiny_search(models: dict[str, Path]) -> dict[str, Any]:
    """The same over the tiny models, with the space's defaults and fewer items and evaluations."""
    return small_search(
        base=str(models["base"]),
        models={"first": str(models["first"]), "second": str(models["second"])},
        items={"search": 8, "heldout": 8},
        space=None,
        optimizer={"name": "cma_es", "evaluations": 6, "population": 4},
    )
