"""What every worker pool must do."""

from dataclasses import replace

from evomerge.candidate import Candidate, Descent, Evaluation, Gradient
from evomerge.recipe import linear
from evomerge.workers import Job, WorkerPool
from evomerge.workers.sharing import Sharing


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

    def test_a_job_that_asks_for_a_gradient_comes_back_with_one_or_with_the_failure_of_its_candidate(self) -> None:
        descents = [Descent(3, 0.5, shard, 2, (("score", 1.0),), ("weight",)) for shard in range(2)]
        for weight in (0.5, -1.0):
            for descent in descents:
                self.pool.submit(replace(job(f"step of {weight}", weight), descent=descent))
        results = [self.pool.wait() for _ in range(4)]
        for done, result in results:
            assert done.descent is not None
            if done.candidate.id == "step of 0.5":
                assert isinstance(result, Gradient)
                assert result.losses == {"score": float(done.descent.shard)}
                assert result.slopes == {("tensor", "model", "weight"): 0.25}
            else:
                assert isinstance(result, Evaluation)
                assert "a bug in the worker" in (result.error or "")
        assert len({done.key for done, _ in results}) == 4

    def test_an_exception_becomes_a_recorded_failure_and_the_pool_goes_on(self) -> None:
        self.pool.submit(job("bad", -1.0))
        self.pool.submit(job("good", 0.5))
        results = {done.candidate.id: evaluation for done, evaluation in (self.pool.wait(), self.pool.wait())}
        assert results["bad"].failed
        assert "a bug in the worker" in (results["bad"].error or "")
        assert results["good"].scores == {"score": 0.5}

    def test_shards_of_candidates_come_back_joined_and_a_failed_shard_is_the_one_failure_of_its_candidate(self) -> None:
        shared = Sharing(self.pool, 4)
        weights = {"whole": 0.5, "fails": -1.0, "other": 0.25}
        for name, weight in weights.items():
            shared.submit(job(name, weight))
        results = {done.candidate.id: (done, result) for done, result in (shared.wait() for _ in weights)}
        assert set(results) == set(weights)
        assert all(done.is_whole for done, _ in results.values())
        for name in ("whole", "other"):
            evaluation = results[name][1]
            assert isinstance(evaluation, Evaluation)
            assert evaluation.scores == {"score": weights[name]}
            assert (evaluation.items, evaluation.seconds) == (4, 4.0)
        failed = results["fails"][1]
        assert isinstance(failed, Evaluation)
        assert "a bug in the worker" in (failed.error or "")

    def test_more_jobs_than_workers_can_be_submitted_between_waits(self) -> None:
        for i in range(self.pool.size + 3):
            self.pool.submit(job(f"job{i}", 0.25))
        assert {self.pool.wait()[0].candidate.id for _ in range(self.pool.size + 3)} == {
            f"job{i}" for i in range(self.pool.size + 3)
        }
