"""Callbacks: functions that see every event of a search while it runs, and may stop it."""

from collections.abc import Callable, Sequence

from evomerge.events import Event, Listener

Callback = Callable[[Event], object]  # what it returns does not count


class StopSearch(Exception):
    """Raised by a callback to stop the search. The run can be resumed later."""


def listener_of(callbacks: Sequence[Callback]) -> Listener:
    """A listener that calls callbacks in their order.

    A library that calls the listener may swallow an exception. So a wish to stop is remembered, and raised again at
    every later event.

    callbacks: the functions; an exception that one of them raises ends the search.
    """
    raised: list[StopSearch] = []

    def listen(event: Event) -> None:
        if raised:
            raise raised[0]
        for callback in callbacks:
            try:
                callback(event)
            except StopSearch as stop:
                raised.append(stop)
                raise

    return listen
