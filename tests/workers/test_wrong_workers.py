"""Workers that cannot be had are refused in one sentence."""

from pathlib import Path
from typing import Any

import pytest

from tests.bad_input import Refuses, check_process
from tests.searches import WriteSearch

WRONG_VALUES: dict[str, tuple[Any, ...]] = {
    "a time limit in this process": (
        {"workers.time_limit": 60},
        "workers.time_limit is 60, but only a worker in a process of its own can be stopped; use pool: ray",
    ),
    "parts of several GPUs": (
        {"workers.num_gpus": 1.5},
        "workers.num_gpus is 1.5; use a part of one GPU (such as 0.5), or whole ones",
    ),
    "several GPUs and the number of one": (
        {"workers.num_gpus": 2, "evaluation.device": "cuda:1"},
        "evaluation.device is cuda:1, but workers.num_gpus is 2; use cuda for several",
    ),
    "an unknown pool": ({"workers.pool": "rai"}, "workers.pool is \"rai\"; did you mean 'ray'?"),
}


@pytest.mark.parametrize("claim", WRONG_VALUES)
def test_a_wrong_value_in_a_search_file_is_refused(claim: str, refuses_search: Refuses) -> None:
    refuses_search(*WRONG_VALUES[claim])


@pytest.mark.ray
def test_more_gpus_than_there_are_are_refused(search: WriteSearch, tmp_path: Path) -> None:
    options = ("--workers", 2, "--set", "workers.num_gpus=64")
    says = ("workers.num_gpus is 64, but torch sees", "give the --address of a Ray cluster")
    check_process("run", search(), "--output", tmp_path / "run", *options, says=says, cwd=tmp_path)


@pytest.mark.ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere", "127.0.0.1:99999"])
def test_an_address_without_cluster_is_refused(address: str, search: WriteSearch, tmp_path: Path) -> None:
    options = ("--workers", 1, "--address", address)
    says = (f"--address {address}: cannot connect to Ray", "start a cluster there, or leave the address out")
    check_process("run", search(), "--output", tmp_path / "run", *options, says=says, cwd=tmp_path)


@pytest.mark.parametrize("options", [(), ("--workers", 0)])
def test_an_address_for_a_search_in_this_process_is_refused(
    options: tuple[object, ...], search: WriteSearch, run_directory: Path, refuses: Refuses
) -> None:
    says = ("--address auto: workers.pool is local", "no cluster is used; leave --address out")
    refuses("run", search(), "--output", "run2", "--address", "auto", *options, says=says)
    refuses("resume", run_directory, "--address", "auto", *options, says=says)
