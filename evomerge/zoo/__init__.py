"""The embedded zoo: tiny Llama fine-tunes that ship with evomerge, for its demo, tests and documentation.

`language` is the world they were taught, `training` makes them, `evals` writes the data that scores them.
"""

from pathlib import Path

from evomerge.errors import InputError, choices

MODELS = Path(__file__).parent / "models"


def names() -> list[str]:
    """The names of the shipped models, sorted."""
    return sorted(config.parent.name for config in MODELS.glob("*/config.json"))


def path(name: str) -> Path:
    """The folder of a shipped model, as `from_pretrained` takes it. Raises InputError for an unknown name."""
    shipped = names()
    if name not in shipped:
        raise InputError(f"zoo:{name} is no model of the zoo; {choices(name, shipped)}.")
    return MODELS / name


def shared(folder: str) -> Path:
    """A folder that comes with evomerge: `evals`, the zoo's tasks, or `search_spaces`. An installation has it in the
    package, a clone beside it."""
    packed = Path(__file__).parent / "shared" / folder
    return packed if packed.is_dir() else Path(__file__).parents[2] / folder
