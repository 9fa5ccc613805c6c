"""The files in scripts/cluster, checked as far as that goes without a cloud, a Kubernetes or a Slurm."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.test_docs import COMMANDS

FILES = REPOSITORY / "scripts" / "cluster"
SLURM = FILES / "slurm.sbatch"


def options_of(command: str) -> set[str]:
    return {option for parameter in COMMANDS[command].params for option in parameter.opts}


def test_the_cluster_launcher_file_fits_rays_own_schema() -> None:
    import jsonschema
    import ray

    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = yaml.safe_load((FILES / "aws.yaml").read_text())
    jsonschema.validate(cluster, schema)
    assert cluster["head_node_type"] in cluster["available_node_types"]
    for command in cluster["head_start_ray_commands"][1:] + cluster["worker_start_ray_commands"][1:]:
        assert "RAY_AUTH_MODE=token" in command


def test_the_kuberay_job_asks_for_a_token_and_goes_on_when_it_is_run_again() -> None:
    job = yaml.safe_load((FILES / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    program, command, *words = job["spec"]["entrypoint"].split()
    assert program == "evomerge"
    assert {word for word in words if word.startswith("--")} == {"--output", "--resume"} <= options_of(command)
    groups: list[dict[str, Any]] = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert container["resources"]["limits"] == container["resources"]["requests"]
    assert all(
        group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in cluster["workerGroupSpecs"]
    )


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An allocation of two nodes, in which every command writes down how it was called."""
    called = tmp_path / "called"
    bodies = {
        "scontrol": "printf 'n1\\nn2\\n'",
        "srun": "while [[ $1 == --* ]]; do shift; done\n"
        f'[ "$1" = hostname ] && echo 127.0.0.1 || echo "$@" >> {called}',
        "evomerge": f'echo evomerge "$@" "${{#RAY_AUTH_TOKEN}}" >> {called}; exit ${{STATUS:-0}}',
    }
    for name, body in bodies.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "8", "CALLED": str(called)}
    return os.environ | variables | {"SLURM_GPUS_ON_NODE": "2", "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_the_slurm_script_starts_ray_on_every_node_and_the_search_on_the_first(slurm: dict[str, str]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 20007)):  # where the head would listen
        command = ["bash", str(SLURM), "search.yaml", "/shared/run", "--set", "seed=2"]
        done = subprocess.run(command, env=slurm | {"STATUS": "3"}, capture_output=True, text=True, timeout=30)
    assert done.returncode == 3, done.stderr
    lines = Path(slurm["CALLED"]).read_text().splitlines()
    assert len(lines) == 3
    node = "--block --num-cpus=8 --num-gpus=2 --disable-usage-stats"
    assert f"ray start --head --node-ip-address=127.0.0.1 --port=20007 --include-dashboard=false {node}" in lines
    assert f"ray start --address=127.0.0.1:20007 {node}" in lines
    run = "evomerge run search.yaml --output /shared/run --address 127.0.0.1:20007 --resume --set seed=2 64"
    assert run in lines  # a token of 64 digits, in the environment alone
    assert {word for word in run.split() if word.startswith("--")} <= options_of("run")


def test_the_slurm_script_says_what_is_missing(slurm: dict[str, str]) -> None:
    done = subprocess.run(["bash", str(SLURM)], env=slurm, capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert "SEARCH.yaml is missing" in done.stderr
