"""Searches as jobs of a Ray head that is started here, and what is said where that cannot be."""

import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

import pytest

from evomerge.config import files
from evomerge.config import search as config
from evomerge.errors import InputError
from evomerge.runs import cluster
from evomerge.search.preparation import prepare
from evomerge.workers import ray_address
from evomerge.workers.ray_address import LOOPBACK_ONLY, reach
from tests.commands import evaluated, evomerge, start
from tests.conftest import REPOSITORY
from tests.waiting import PATIENCE, wait_until

DEMO = REPOSITORY / "search_spaces" / "demo.yaml"
TOKEN = "open-sesame"
SMALL = (
    "optimizer={name: group_evolution, evaluations: 240}",  # some twenty seconds, so that it can be stopped amid
    "workers.placement_timeout=300",
    "items={search: 10, heldout: 10}",
    "controls={}",
    "workers.count=1",
)


def free_ports(count: int) -> list[int]:
    """Ports below those that Ray hands to its workers."""
    taken = [socket.socket() for _ in range(count)]
    found = []
    for number in range(9000, 9900):
        if len(found) == count:
            break
        try:
            taken[len(found)].bind(("127.0.0.1", number))
        except OSError:
            continue
        found.append(number)
    for each in taken:
        each.close()
    return found


class Head(NamedTuple):
    dashboard: str
    gcs: str


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """The addresses of a Ray head that asks for a token and listens on loopback only."""
    folder, (port, dashboard, client) = Path(tempfile.mkdtemp(prefix="rh")), free_ports(3)
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--temp-dir={folder}"]
    command += [f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=1"]
    command += ["--dashboard-agent-listen-port=0", f"--ray-client-server-port={client}", "--disable-usage-stats"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PATH": path} | LOOPBACK_ONLY
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{dashboard}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        patch.setenv("RAY_API_SERVER_ADDRESS", address)
        patch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")

        def answers() -> bool:
            assert process.poll() is None
            try:
                cluster.Cluster(address).jobs()
            except Exception:
                return False
            return True

        wait_until(answers, pause=0.3)
        yield Head(address, f"127.0.0.1:{port}")
    process.terminate()
    process.wait(PATIENCE)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
def test_a_submitted_search_is_followed_stopped_and_resumed_by_submitting_it_again(head: Head, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    command = ["submit", DEMO, "--output", directory, *(part for setting in SMALL for part in ("--set", setting))]
    first = evomerge(*command).split()[0]
    followed = tmp_path / "followed"
    process = start(tmp_path / "errors", "logs", first, "--follow", output=followed)

    def advanced() -> bool:
        assert process.poll() is None, (tmp_path / "errors").read_text()
        return re.search(r"\d/\d", followed.read_text()) is not None

    wait_until(advanced, followed.read_text)
    evomerge(*command, status=2)  # the job is at work there
    assert " stopped;" in evomerge("stop", first)
    assert process.wait(PATIENCE) == 0
    assert f"go on with `evomerge resume {directory}`" in followed.read_text()
    done = evaluated(directory)
    assert json.loads(evomerge("status", directory, "--json"))["state"] == "interrupted"

    second = evomerge(*command).split()[0]
    assert second != first
    assert "already recorded" in evomerge("logs", second, "--follow")
    assert json.loads(evomerge("status", directory, "--json"))["state"] == "finished"
    assert evaluated(directory)[: len(done)] == done
    assert max(Counter(evaluated(directory)).values()) == 1
    rows = json.loads(evomerge("jobs", "--json"))
    assert [(row["id"], row["state"], row["directory"]) for row in rows] == [
        (first, "stopped", str(directory)),
        (second, "succeeded", str(directory)),
    ]
    assert not [path for path in directory.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in evomerge("logs", second)


@pytest.mark.ray
def test_a_head_lets_nobody_in_without_its_token(head: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    with pytest.raises(InputError, match="the cluster asks for a token, and there is none here"):
        cluster.Cluster(head.dashboard)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(InputError, match="the cluster refuses the token"):
        cluster.Cluster(head.dashboard)


@pytest.mark.ray
def test_a_token_is_asked_for_in_seconds_where_ray_would_take_half_a_minute(
    head: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "")
    for name in LOOPBACK_ONLY:
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    for token, says in (("", "asks for a token, and there is none here"), ("wrong", "refuses the token that is here")):
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        with pytest.raises(InputError, match=says):
            reach(head.gcs)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    reach(head.gcs)
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_a_live_port_that_is_not_ray_is_told_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_address, "_PATIENCE", 0.5)
    for name in LOOPBACK_ONLY:
        monkeypatch.setenv(name, "")
    with socket.create_server(("127.0.0.1", 0)) as server:
        for scheme in ("", "ray://"):
            with pytest.raises(OSError, match="something answers there, but it is not Ray"):
                reach(f"{scheme}127.0.0.1:{server.getsockname()[1]}")


def test_a_driver_without_a_gpu_takes_the_searchs_word_for_a_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("evomerge.devices.device_count", lambda kind: 0)
    smoke = files.load(
        REPOSITORY / "search_spaces" / "smoke.yaml", ("workers.pool=ray", "items={search: 4, heldout: 4}")
    )

    def device(**changes: object) -> str:
        workers = smoke.workers.model_copy(update={key: changes[key] for key in changes.keys() - {"device"}})
        evaluation = smoke.evaluation.model_copy(update={"device": changes.get("device", "auto")})
        config = smoke.model_copy(update={"workers": workers, "evaluation": evaluation})
        return prepare(config, address).config.evaluation.device

    address: str | None = "head:6379"
    assert device(device="cuda") == device(num_gpus=0.5) == "cuda"
    assert device(num_gpus=0) == "cpu"
    with pytest.raises(InputError, match="torch sees 0 CUDA devices here"):
        device(device="cuda", pool="local")
    address = None  # a Ray that is started here has what is here
    assert device() == device(num_gpus=0) == "cpu"
    with pytest.raises(InputError, match="torch sees 0 CUDA devices here"):
        device(device="cuda")
    with pytest.raises(InputError, match=r"workers\.num_gpus is 0\.5, but torch sees no GPU here; give the --address"):
        device(num_gpus=0.5)


@pytest.mark.parametrize("kind", ["cpu", "cuda", "xpu"])
def test_auto_is_what_the_cluster_has_where_the_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    asked: list[str] = []
    monkeypatch.setattr("evomerge.devices.device_count", lambda kind: 0)
    monkeypatch.setattr("evomerge.workers.ray_pool.cluster_device", lambda address: asked.append(address) or kind)
    changes = ["items={search: 4, heldout: 4}", "workers.pool=ray"]
    smoke = REPOSITORY / "search_spaces" / "smoke.yaml"
    assert prepare(files.load(smoke, changes), "head:6379").config.evaluation.device == kind
    assert prepare(files.load(smoke, [*changes, "workers.num_gpus=1"]), "head:6379").config.evaluation.device == "cuda"
    assert prepare(files.load(smoke, changes[:1]), "head:6379").config.evaluation.device == "cpu"  # in this process
    assert asked == ["head:6379"]


class Page(http.server.BaseHTTPRequestHandler):
    """A web server that is no Ray, and remembers what it was told."""

    heard: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.heard.append(str(self.headers))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>")

    def log_message(self, *_: object) -> None:
        pass


def test_what_answers_and_is_no_ray_is_told_apart_in_seconds_and_hears_no_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    server = http.server.HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    with pytest.raises(InputError, match=f"{address}: something answers there, but it is no Ray dashboard"):
        cluster.Cluster(address)
    server.shutdown()
    server.server_close()
    assert Page.heard
    assert TOKEN not in "".join(Page.heard)
    with pytest.raises(InputError, match=f"{address}: no answer"):
        cluster.Cluster(address)


@pytest.mark.parametrize(
    "address", ["http://10.0.0.1:8265", "10.0.0.1:8265", "http://head:8265", "http://127.0.0.1.evil.org"]
)
def test_plain_http_to_another_machine_is_refused_unless_asked_for(address: str) -> None:
    with pytest.raises(InputError, match="plain HTTP to another machine shows the token"):
        cluster.check_address(address, insecure=False)
    assert cluster.check_address(address, insecure=True).startswith("http://")


def test_loopback_and_https_are_fine() -> None:
    for address in ("http://127.0.0.1:8265", "http://localhost:8265", "http://[::1]:8265", "https://head:8265"):
        assert cluster.check_address(f"{address}/", insecure=False) == address


@pytest.mark.parametrize(
    "address", ["", "ftp://head", "http://head:x", "http://me:pw@127.0.0.1:8265", "ray://127.0.0.1:10001"]
)
def test_what_is_no_address_of_a_dashboard_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="dashboard"):
        cluster.check_address(address, insecure=False)


def test_a_job_carries_its_tasks_under_a_name_made_from_their_content(tmp_path: Path) -> None:
    tasks = shutil.copytree(REPOSITORY / "evals" / "base_qa", tmp_path / "tasks")
    (tasks / ".gitignore").write_text("*")
    search = tmp_path / "search.yaml"
    text = DEMO.read_text().replace("../evals", "tasks")
    search.write_text(text)

    def packed(name: str) -> tuple[config.SearchConfig, Path]:
        (tmp_path / name).mkdir()
        cluster.pack(files.load(search, ["objectives=[{task: base_qa}]", "report=[]"]), "/shared/run", tmp_path / name)
        return files.load(tmp_path / name / "search.yaml"), tmp_path / name

    (first, folder), (again, _) = packed("first"), packed("again")
    assert first == again
    (path,) = first.tasks.paths
    assert path.startswith("/shared/run/tasks/")
    unpacked = tmp_path / "cluster"
    cluster.unpack(folder, unpacked, cluster.version("evomerge"))
    copied = unpacked / Path(path).relative_to("/shared/run")
    data = {file.name: file.read_bytes() for file in tasks.iterdir() if file.name != ".gitignore"}
    assert {file.name: file.read_bytes() for file in copied.iterdir()} == data
    (tasks / "base_qa.yaml").write_text("task: base_qa\n")
    assert packed("changed")[0].tasks.paths != first.tasks.paths


def test_a_job_that_would_leave_a_data_file_behind_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = shutil.copytree(REPOSITORY / "evals" / "base_qa", tmp_path / "tasks")
    (tasks / "search.jsonl").rename(tmp_path / "search.jsonl")
    search = tmp_path / "search.yaml"
    search.write_text(DEMO.read_text().replace("../evals", "tasks"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "packed").mkdir()
    with pytest.raises(InputError, match=r"data file .*search.jsonl of task 'base_qa' lies outside the folders"):
        cluster.pack(
            files.load(search, ["objectives=[{task: base_qa}]", "report=[]"]), "/shared/run", tmp_path / "packed"
        )


def test_another_version_on_the_cluster_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"submitted by evomerge 9\.9, but this cluster has"):
        cluster.unpack(tmp_path, tmp_path / "run", "9.9")
    assert not (tmp_path / "run").exists()


def test_a_job_needs_a_directory_that_outlives_it_and_tasks_that_are_here(tmp_path: Path) -> None:
    demo = files.load(DEMO)
    with pytest.raises(InputError, match="--output runs/x: give a path on the cluster that begins with"):
        cluster.pack(demo, "runs/x", tmp_path)
    gone = demo.model_copy(update={"tasks": demo.tasks.model_copy(update={"paths": (str(tmp_path / "gone"),)})})
    with pytest.raises(InputError, match=r"tasks\.paths\[0\] is .*gone, which does not exist here"):
        cluster.pack(gone, "/x", tmp_path)


def test_a_directory_with_blanks_is_one_word_to_the_shell_of_the_head() -> None:
    command = cluster.entrypoint("/data/$(touch x); y")
    assert command.count("'/data/$(touch x); y'") == 2
    assert re.search(r"exec evomerge run search\.yaml .*--resume$", command)
