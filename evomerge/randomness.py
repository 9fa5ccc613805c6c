"""Random numbers by counter: a draw depends on its purpose alone, and not on earlier draws."""

import numpy as np


def counter_rng(*counter: int | str) -> np.random.Generator:
    """A generator that depends on its counter alone.

    counter: whole numbers and names, such as the seed, the purpose, the generation and the index.
    """
    words: list[int] = []
    for entry in counter:
        words += [*entry.encode()] if isinstance(entry, str) else [entry]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
