"""The versions of everything that a score depends on."""


def versions() -> dict[str, str]:
    """The versions of everything that can change a result."""
    from importlib.metadata import version

    names = ("evomerge", "torch", "transformers", "lm_eval", "cma", "cmaes", "moocore", "numpy")
    return {name: version(name) for name in names}
