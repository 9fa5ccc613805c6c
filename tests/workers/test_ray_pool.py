import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from evomerge.candidate import Candidate
from evomerge.config.running import WorkersConfig
from evomerge.errors import InputError, WorkFailed
from evomerge.recipe import linear
from evomerge.workers import Job, ray_pool
from evomerge.workers.ray_address import LOOPBACK_ONLY
from evomerge.workers.ray_pool import RayPool
from tests.contracts.pool import PoolContract, job
from tests.fakes import make_fake_worker, make_worker_that_names_its_gpus
from tests.waiting import wait_until

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def ray_here() -> Iterator[Any]:
    """One cluster of one node, with GPUs that are not there, for all tests of this module: starting it takes seconds.
    Its object store is small, and may not grow on the disk."""
    import ray
    from ray.cluster_utils import Cluster

    settings = {"automatic_object_spilling_enabled": False, "local_fs_capacity_threshold": 0.0}
    resources = {"num_cpus": 2, "num_gpus": 2, "object_store_memory": 80 * 2**20}
    head = {**resources, "include_dashboard": False, "_system_config": settings}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def pool(ray_here: Any) -> Iterator[RayPool]:
    made = RayPool(WorkersConfig(count=2, num_cpus=1, attempts=2), make_fake_worker, num_gpus=0)
    yield made
    made.close()


def test_the_cluster_is_asked_for_the_kind_of_its_gpus(ray_here: Any) -> None:
    assert ray_pool.cluster_device(ray_here.address) == "cuda"
    assert ray_here.address  # the connection that was there before is still there
    assert RayPool(WorkersConfig(count=1, num_cpus=1), make_fake_worker, num_gpus=0).close() is None


class TestRayPool(PoolContract):
    @pytest.fixture(autouse=True)
    def _pool(self, pool: RayPool) -> None:
        self.pool = pool


def test_a_candidate_that_kills_every_worker_it_meets_is_recorded_and_the_pool_goes_on(pool: RayPool) -> None:
    pool.submit(job("killer", 2.0))
    for i in range(4):
        pool.submit(job(f"good{i}", 0.5))
    results = {done.candidate.id: evaluation for done, evaluation in (pool.wait() for _ in range(5))}
    assert "took 2 workers down" in (results["killer"].error or "")
    assert all(results[f"good{i}"].scores == {"score": 0.5} for i in range(4))


def test_a_candidate_that_hangs_or_spoils_its_worker_is_recorded_and_the_pool_goes_on(ray_here: Any) -> None:
    made = RayPool(WorkersConfig(count=2, num_cpus=1, time_limit=1.5), make_fake_worker, num_gpus=0)
    events = []
    made.listener = lambda event: events.append((event.name, event.fields().get("id")))
    try:
        for name, weight in {"hangs": 3.0, "spoils": 4.0, "good0": 0.5, "good1": 0.5}.items():
            made.submit(job(name, weight))
        results = {done.candidate.id: evaluation for done, evaluation in (made.wait() for _ in range(4))}
    finally:
        made.close()
    assert results["hangs"].error == "took longer than workers.time_limit, which is 1.5 s"
    assert results["spoils"].error == "took 2 workers down (the GPU computes nothing any more)"
    assert results["good0"].scores == results["good1"].scores == {"score": 0.5}
    assert {("worker_killed", "hangs"), ("candidate_retried", "spoils")} <= set(events)
    assert [event for event, _ in events].count("worker_lost") == 2


@pytest.mark.parametrize("side", ["worker", "driver"])
def test_a_cluster_without_room_is_a_sentence(pool: RayPool, side: str) -> None:
    """A result, or a recipe, that is larger than the object store stands for a store that others have filled."""
    large = Candidate("large", "search", 0, 0, linear({"x" * (150 * 2**20): 0.5}))

    def fill() -> None:
        pool.submit(job("fills", 5.0) if side == "worker" else Job(large, "search"))
        pool.wait()

    with pytest.raises(WorkFailed, match=r"no room for results.*nothing was lost: free its object store or its disks"):
        fill()


def test_a_worker_killed_from_outside_is_replaced_and_its_candidate_run_again(ray_here: Any) -> None:
    # three attempts, since both of the dying may meet one job
    pool = RayPool(WorkersConfig(count=2, num_cpus=1, attempts=3), make_fake_worker, num_gpus=0)
    try:
        actors = [child for child in psutil.Process().children(recursive=True) if "EvaluationActor" in child.name()]
        assert len(actors) == 2
        for number, actor in enumerate(actors):
            pool.submit(job(f"job{number}", 0.5))
            actor.kill()
        results = [pool.wait()[1] for _ in actors]
    finally:
        pool.close()
    assert [evaluation.scores for evaluation in results] == [{"score": 0.5}] * 2


def test_a_worker_without_resources_is_a_sentence_that_names_them_within_a_minute(ray_here: Any) -> None:
    started = time.monotonic()
    with pytest.raises(InputError, match=r"1 worker\(s\) of 3 GPU each need 3 GPU, but the Ray cluster has 2"):
        RayPool(WorkersConfig(count=1, placement_timeout=2), make_fake_worker, num_gpus=3)
    with pytest.raises(InputError, match=r"lower workers\.count or workers\.num_cpus"):
        RayPool(WorkersConfig(count=3, placement_timeout=2), make_fake_worker, num_gpus=0)
    assert time.monotonic() - started < 60


def test_a_worker_that_finds_the_cluster_at_other_work_is_a_sentence_that_says_so(ray_here: Any) -> None:
    others = RayPool(WorkersConfig(count=1, num_cpus=2), make_fake_worker, num_gpus=0)
    try:
        with pytest.raises(InputError, match=r"1 worker\(s\) of 1 CPU each found no free place in 1 s: other work"):
            RayPool(WorkersConfig(count=1, placement_timeout=1), make_fake_worker, num_gpus=0)
    finally:
        others.close()


class Unreadable:
    def __reduce__(self) -> tuple[Any, ...]:
        return refuse_to_read, ()


def refuse_to_read() -> None:
    raise RuntimeError("cannot be read")


def test_an_actor_has_its_place_before_it_reads_what_makes_its_worker(ray_here: Any) -> None:
    """To read it may import torch, which takes longer on a busy machine than a place may be waited for."""
    import ray

    actor = ray_pool.EvaluationActor(ray.cloudpickle.dumps(Unreadable()))
    actor.ready()
    with pytest.raises(RuntimeError, match="cannot be read"):
        actor.load()


def test_without_a_count_there_are_as_many_workers_as_fit(ray_here: Any) -> None:
    made = RayPool(WorkersConfig(num_cpus=0.8), make_fake_worker, num_gpus=0)
    try:
        assert made.size == 2
    finally:
        made.close()


@pytest.mark.parametrize(("gpus", "count", "seen"), [(2, None, ["0,1"]), (0.5, 2, ["0", "0"])])
def test_workers_get_several_gpus_or_a_part_of_one(
    ray_here: Any, gpus: float, count: int | None, seen: list[str]
) -> None:
    made = RayPool(WorkersConfig(num_cpus=0, count=count), make_worker_that_names_its_gpus, num_gpus=gpus)
    try:
        assert made.size == len(seen)
        for number in range(2 * made.size):
            made.submit(job(f"job{number}", 0.5))
        assert [made.wait()[1].fingerprint for _ in range(2 * made.size)] == [*seen, *seen]
    finally:
        made.close()


def test_workers_join_when_a_node_arrives_and_the_pool_goes_on_when_it_leaves(
    ray_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pool, "_GROWTH", 0.1)
    made = RayPool(WorkersConfig(num_cpus=2), make_fake_worker, num_gpus=0)
    sizes, done = [made.size], []

    def run_until(size: int) -> None:
        def reached() -> bool:
            made.submit(job(f"job{len(done)}", 0.5))
            done.append(made.wait()[1].scores)
            sizes.append(made.size)
            return sizes[-1] == size

        wait_until(reached, lambda: sizes)

    try:
        node = ray_here.add_node(num_cpus=2)
        run_until(2)
        ray_here.remove_node(node, allow_graceful=False)
        run_until(1)
        assert done == [{"score": 0.5}] * len(done)
    finally:
        made.close()


def test_a_ray_started_here_asks_for_a_token_that_stands_in_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", *LOOPBACK_ONLY):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    ray_pool._keep_to_this_machine()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert not list(tmp_path.iterdir())


def test_a_second_worker_of_a_node_shares_the_sources(ray_here: Any, tmp_path: Path) -> None:
    import ray
    import torch
    from safetensors.torch import save_file

    from evomerge.merging.resident.sources import OffDevice, finite
    from evomerge.merging.sources.weights import Weights
    from tests.merging.resident.test_sources import taken

    size = 256 << 20  # beside which what Ray needs in a process counts little
    save_file({"a": torch.ones(size // 2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")

    @ray.remote(num_cpus=1)
    class Holding:
        def __init__(self) -> None:
            assert bool(finite(torch.ones(1 << 17, dtype=torch.bfloat16)))  # starts what computing needs
            self.before = taken(tmp_path)
            source = OffDevice(Weights(tmp_path), "a", torch.Size([size // 2]), {})
            self.tensor = source.on(torch.device("cpu"))
            assert bool(finite(self.tensor))

        def grown(self) -> int:
            return taken(tmp_path) - self.before

    first = Holding.remote()
    alone = ray.get(first.grown.remote())
    second = Holding.remote()
    ray.get(second.grown.remote())  # has read all of it
    together = sum(ray.get([first.grown.remote(), second.grown.remote()]))
    assert alone > 0.9 * size
    assert together - alone < 0.1 * size
