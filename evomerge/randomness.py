"""Random numbers by counter: each draw depends on what it is for, and on nothing that was drawn before."""

import numpy as np


def counter_rng(*counter: int | str) -> np.random.Generator:
    """A generator that depends on nothing but its counter (seed, purpose, generation, index)."""
    words: list[int] = []
    for part in counter:
        words += [*part.encode()] if isinstance(part, str) else [part]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
