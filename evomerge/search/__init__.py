"""The search: everything is prepared, candidates are proposed and scored, and the best is chosen.

The function `evomerge.search` has the same name as this room, and Python puts the room in its place once a file of it
is imported. So the room can be called, and calling it is calling the function.
"""

import importlib
import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """See `evomerge.library.runs.search`."""
        return importlib.import_module("evomerge.library.runs").search(*arguments, **named)


sys.modules[__name__].__class__ = _Room
