"""evomerge finds the recipe: evolutionary search over merges of language models.

Programs and notebooks use the names below; people use the command `evomerge`. Every name is imported when it is first
used, so that `import evomerge` costs nothing.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evomerge.library.callbacks import StopSearch as StopSearch
    from evomerge.library.recipes import load_recipe as load_recipe
    from evomerge.library.recipes import merge as merge
    from evomerge.library.runs import Run as Run
    from evomerge.library.runs import open_run as open_run
    from evomerge.library.runs import search as search

_PLACES = {
    "Run": "runs",
    "StopSearch": "callbacks",
    "load_recipe": "recipes",
    "merge": "recipes",
    "open_run": "runs",
    "search": "runs",
}
__all__ = ["Run", "StopSearch", "__version__", "load_recipe", "merge", "open_run", "search"]
__version__ = version("evomerge")


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"evomerge.library.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'evomerge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
