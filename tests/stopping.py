"""Ends a run in the middle, as a kill would."""

from evomerge.events import Evaluated, Event, Listener, Stepped


class Stop(Exception):
    """Stands for a kill."""


def stopper(count: int, heard: list[Event] | None = None) -> Listener:
    """Ends a run after so many candidates and steps along gradients.

    heard: where all events go.
    """
    left = count

    def stop(event: Event) -> None:
        nonlocal left
        if heard is not None:
            heard.append(event)
        left -= isinstance(event, Stepped | Evaluated)
        if left == 0:
            raise Stop

    return stop
