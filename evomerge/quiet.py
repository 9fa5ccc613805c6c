"""Keeps libraries' progress bars, log lines and warnings off the terminal while they work for us."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

_LOUD = ("lm_eval", "datasets", "transformers", "accelerate", "optuna")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within it, nothing is logged, no warnings are shown, and standard error is dropped."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)  # their errors reach us as exceptions
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
