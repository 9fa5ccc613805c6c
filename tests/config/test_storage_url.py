"""A storage that cannot be opened is refused, and its password never repeated."""

from typing import Any

import pytest

from tests.bad_input import Refuses
from tests.searches import WriteSearch

WRONG_VALUES: dict[str, tuple[Any, ...]] = {
    "a storage that is no address": ({"storage": "nonsense"}, "storage is nonsense, which cannot be opened"),
    "a storage that is not there": ({"storage": "sqlite:////nowhere/at/all.db"}, "storage is sqlite:////nowhere"),
    "a relative storage below nothing": ({"storage": "sqlite:///nowhere/all.db"}, "storage is sqlite:///nowhere"),
}


@pytest.mark.parametrize("claim", WRONG_VALUES)
def test_a_wrong_value_in_a_search_file_is_refused(claim: str, refuses_search: Refuses) -> None:
    refuses_search(*WRONG_VALUES[claim])


def test_the_password_of_a_storage_is_not_repeated(search: WriteSearch, refuses: Refuses) -> None:
    path = search({"storage": "nosuchdb://me:secret@127.0.0.1:1/x"})
    refuses("run", path, "--output", "new/run", says=("storage: nosuchdb://me:***@127.0.0.1:1/x holds a password",))


def test_the_password_of_a_storage_from_the_environment_is_not_repeated(
    search: WriteSearch, refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_STORAGE", "nosuchdb://me:secret@127.0.0.1:1/x")
    path = search({"storage": "${EVOMERGE_STORAGE}"})
    refuses("run", path, "--output", "new/run", says=("storage is nosuchdb://me:***@127.0.0.1:1/x, which cannot",))
    refuses("status", "${EVOMERGE_STORAGE}", says=("storage is nosuchdb://me:***@127.0.0.1:1/x, which cannot",))
    monkeypatch.delenv("EVOMERGE_STORAGE")
    says = ("storage is ${EVOMERGE_STORAGE}, but the environment variable EVOMERGE_STORAGE is not set here",)
    refuses("run", path, "--output", "new/run", says=says)
