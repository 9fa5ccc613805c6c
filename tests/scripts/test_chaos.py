"""A search over three nodes survives the loss of one of them and of its driver."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.waiting import PATIENCE

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_search_over_three_nodes_survives_the_loss_of_a_node_and_of_the_driver() -> None:
    """It ends with the undisturbed archive, and nothing that was finished is evaluated again."""
    chaos = [sys.executable, REPOSITORY / "scripts" / "bench" / "chaos", "--plan", "node", "driver"]
    sizes = ["--evaluations", "40", "--duration", "0.2", "--pause", "0.1"]
    run = subprocess.run([*chaos, *sizes], capture_output=True, text=True, timeout=2 * PATIENCE)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert (result["node"], result["driver"], result["worker"]) == (1, 1, 0)
    assert (result["lost"], result["repeated"], result["different"]) == (0, 0, 0)
