"""The versions of everything that a score depends on."""

FORMAT = 2  # of a run: a version reads all formats up to its own, and goes on with searches of its own alone


def versions() -> dict[str, str]:
    """The versions of everything that can change a result."""
    from importlib.metadata import version

    names = ("evomerge", "torch", "transformers", "lm_eval", "cma", "cmaes", "moocore", "numpy")
    return {name: version(name) for name in names}
