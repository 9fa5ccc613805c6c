"""Keeps libraries' progress bars, log lines and warnings off the terminal while they work for us."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within it, nothing is logged, no warnings are shown, and standard error is dropped."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # their errors reach us as exceptions
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
