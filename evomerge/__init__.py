"""evomerge finds the recipe: evolutionary search over merges of language models.

Programs use `load_recipe` and `merge`; people use the command `evomerge`. Both names are imported when they are first
used, so that `import evomerge` costs nothing.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evomerge.library import load_recipe as load_recipe
    from evomerge.library import merge as merge

__all__ = ["__version__", "load_recipe", "merge"]
__version__ = version("evomerge")


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("evomerge.library"), name)
    raise AttributeError(f"module 'evomerge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
