"""What every worker pool must do."""

from evomerge.candidate import Candidate
from evomerge.recipe import linear
from evomerge.workers import Job, WorkerPool


def job(name: str, weight: float) -> Job:
    return Job(Candidate(name, "search", 0, 0, linear({"model": weight})), "search")


class PoolContract:
    """To test a pool: subclass, and make `pool` fresh for each test from `tests.fakes.make_fake_worker`."""

    pool: WorkerPool

    def test_every_job_comes_back_once_with_its_own_evaluation(self) -> None:
        weights = {f"job{i}": i / 16 for i in range(16)}
        for name, weight in weights.items():
            self.pool.submit(job(name, weight))
        results = [self.pool.wait() for _ in weights]
        assert {done.candidate.id: (evaluation.scores or {})["score"] for done, evaluation in results} == weights

    def test_an_exception_becomes_a_recorded_failure_and_the_pool_goes_on(self) -> None:
        self.pool.submit(job("bad", -1.0))
        self.pool.submit(job("good", 0.5))
        results = {done.candidate.id: evaluation for done, evaluation in (self.pool.wait(), self.pool.wait())}
        assert results["bad"].failed
        assert "a bug in the worker" in (results["bad"].error or "")
        assert results["good"].scores == {"score": 0.5}

    def test_more_jobs_than_workers_can_be_submitted_between_waits(self) -> None:
        for i in range(self.pool.size + 3):
            self.pool.submit(job(f"job{i}", 0.25))
        assert {self.pool.wait()[0].candidate.id for _ in range(self.pool.size + 3)} == {
            f"job{i}" for i in range(self.pool.size + 3)
        }
