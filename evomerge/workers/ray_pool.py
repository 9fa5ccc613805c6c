"""A pool of Ray actors, each holding the models; the only module that imports ray for evaluating.

Actors are placed by a placement group, so that one without resources is a sentence and not a hang. An actor that dies
is restarted by Ray and its job run again; a job that has taken `attempts` actors down is recorded as failed.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from evomerge.candidate import Evaluation, failure
from evomerge.config import WorkersConfig
from evomerge.errors import EvomergeError, InputError, WorkFailed
from evomerge.workers import Job
from evomerge.workers.worker import Worker

_BACKOFF = 0.5
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass
class _Attempt:
    job: Job
    actor: int
    count: int


@dataclass
class RayPool:
    """Connects to Ray (or starts it here), places the actors and waits until each has loaded its models."""

    config: WorkersConfig
    make_worker: Callable[[], Worker]
    num_gpus: float
    address: str | None = None
    _actors: list[Any] = field(init=False, default_factory=list)
    _idle: deque[int] = field(init=False, default_factory=deque)
    _waiting: deque[tuple[Job, int]] = field(init=False, default_factory=deque)
    _running: dict[Any, _Attempt] = field(init=False, default_factory=dict)
    _group: Any = field(init=False, default=None)
    _ray: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        os.environ.update({key: os.environ.get(key, value) for key, value in _ENVIRONMENT.items()})
        import ray

        self._ray = ray
        self._started_ray = not ray.is_initialized()
        try:
            self._connect()
            self._place()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        if not self._started_ray:
            return
        address = self.address or os.environ.get("RAY_ADDRESS")
        local: dict[str, Any] = {} if address else {"include_dashboard": False}
        try:
            self._ray.init(
                address=address, namespace="evomerge", log_to_driver=False, logging_level=logging.ERROR, **local
            )
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            raise InputError(
                f"--address {address}: cannot connect to Ray ({str(error).splitlines()[0]}); start a cluster there, or "
                "leave the address out to start one here."
            ) from None

    def _place(self) -> None:
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = {"CPU": self.config.num_cpus, "GPU": self.num_gpus}
        bundle = {resource: amount for resource, amount in bundle.items() if amount}
        count = self.config.count or self._fitting(bundle)
        self._group = placement_group([dict(bundle or {"CPU": 0.01}) for _ in range(count)], strategy="PACK")
        if not self._group.wait(self.config.placement_timeout):
            raise InputError(self._missing(bundle, count))
        actor = self._ray.remote(EvaluationActor)
        for index in range(count):
            strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
            self._actors.append(
                actor.options(
                    num_cpus=self.config.num_cpus,
                    num_gpus=self.num_gpus,
                    max_restarts=-1,
                    max_task_retries=0,
                    scheduling_strategy=strategy,
                ).remote(self.make_worker)
            )
        self._await_models()
        self._idle.extend(range(count))

    def _fitting(self, bundle: dict[str, float]) -> int:
        """As many workers as the cluster's resources hold."""
        total = self._ray.cluster_resources()
        return max(1, min((int(total.get(name, 0) / amount) for name, amount in bundle.items()), default=1))

    def _missing(self, bundle: dict[str, float], count: int) -> str:
        total = self._ray.cluster_resources()
        for name, amount in bundle.items():
            if total.get(name, 0) < amount * count:
                return (
                    f"workers: {count} worker(s) of {amount:g} {name} each need {amount * count:g} {name}, but the Ray "
                    f"cluster has {total.get(name, 0):g}; lower workers.count or workers.num_{name.lower()}s, "
                    "or add nodes."
                )
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
        return (
            f"workers: {count} worker(s) of {wanted} each found no free place in {self.config.placement_timeout:g} s, "
            "since other work holds the cluster's resources; wait for it, or lower workers.count."
        )

    def _await_models(self) -> None:
        for actor in self._actors:
            try:
                problem = self._ray.get(actor.load.remote())
            except self._ray.exceptions.RayActorError as error:
                raise WorkFailed(f"workers: a worker died while it loaded the models ({_first_line(error)}).") from None
            if problem is not None:
                raise InputError(problem)

    @property
    def size(self) -> int:
        return len(self._actors)

    def submit(self, job: Job) -> None:
        self._waiting.append((job, 0))
        self._dispatch()

    def _dispatch(self) -> None:
        while self._waiting and self._idle:
            (job, count), actor = self._waiting.popleft(), self._idle.popleft()
            reference = self._actors[actor].evaluate.remote(job.candidate.recipe, job.split)
            self._running[reference] = _Attempt(job, actor, count + 1)

    def wait(self) -> tuple[Job, Evaluation]:
        while True:
            self._dispatch()
            (reference,), _ = self._ray.wait(list(self._running), num_returns=1)
            attempt = self._running.pop(reference)
            outcome = self._outcome(reference, attempt)
            self._idle.append(attempt.actor)
            if outcome is not None:
                self._dispatch()
                return attempt.job, outcome

    def _outcome(self, reference: Any, attempt: _Attempt) -> Evaluation | None:
        """The evaluation, or None where the actor died and the job has been queued again."""
        try:
            result: Evaluation = self._ray.get(reference)
            return result
        except self._ray.exceptions.RayTaskError as error:
            cause = error.as_instanceof_cause()
            if isinstance(cause, EvomergeError):
                raise cause from None
            return failure(_first_line(error))
        except self._ray.exceptions.RayError as error:
            if attempt.count >= self.config.attempts:
                return failure(f"took {attempt.count} workers down ({_first_line(error)})")
            self._waiting.appendleft((attempt.job, attempt.count))
            time.sleep(_BACKOFF)
            return None

    def close(self) -> None:
        """Kills the actors; shuts Ray down where this pool started it."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors.clear()
        if self._group is not None:
            from ray.util.placement_group import remove_placement_group

            remove_placement_group(self._group)
            self._group = None
        if self._started_ray and self._ray.is_initialized():
            self._ray.shutdown()


class EvaluationActor:
    """The actor: a worker made in the actor's own process, on first use after each (re)start."""

    def __init__(self, make_worker: Callable[[], Worker]) -> None:
        self._make_worker = make_worker
        self._worker: Worker | None = None

    def load(self) -> str | None:
        """Loads the models; a sentence where that cannot be done."""
        try:
            self._worker = self._worker or self._make_worker()
        except EvomergeError as error:
            return str(error)
        return None

    def evaluate(self, recipe: Any, split: Any) -> Evaluation:
        if self._worker is None:
            self._worker = self._make_worker()
        return self._worker.evaluate(recipe, split)

    def process_id(self) -> int:
        return os.getpid()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
