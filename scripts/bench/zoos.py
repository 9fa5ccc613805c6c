"""Zoos of other numbers, for benchmarks that must not depend on the one zoo that ships.

A setting that is chosen by a zoo's results must be chosen on other zoos than those on which it is then reported.
"""

import json
import subprocess
import sys
from pathlib import Path

from evomerge.zoo.training import RECORD, SHIPPED


def models_of(number: int, folder: Path) -> list[str]:
    """The settings (`--set`) that make the demo's search one of a zoo's models; none for the shipped zoo.

    number: the zoo's. It is trained now (in a minute or two) unless it is there.
    folder: where zoos are kept, each in a folder of its own.
    """
    if number == SHIPPED:
        return []
    zoo = (folder / str(number)).resolve()
    if not (zoo / RECORD).exists():
        command = [sys.executable, "-m", "evomerge.zoo.training", "--seed", str(number), "--models", str(zoo)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    keys = {"base": "base", "models.math": "math", "models.lang": "lang"}
    return [f"{key}={json.dumps(str(zoo / name))}" for key, name in keys.items()]
