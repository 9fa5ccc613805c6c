"""A pool of Ray actors that each hold the models. This is the only module that imports ray for evaluating.

Actors are requested one by one, and those that get a place load their models in parallel. Where too few get a place,
the user is told instead of waiting forever. The other actors join when there is room. Where no count is given, more are
requested as nodes join.

When an actor dies, Ray restarts it, it loads its models again, and its job is run again. A candidate that has taken
`attempts` actors down is recorded as failed; the loss of a node does not count. A job that takes longer than the time
limit is recorded as failed too, and its actor is killed. The pool goes on with the actors that are left, and gives up
only when none has come back for a long time.
"""

import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from evomerge.candidate import failure
from evomerge.config.running import WorkersConfig
from evomerge.config.search import SearchConfig
from evomerge.errors import EvomergeError, InputError, WorkerPoisoned, WorkFailed, first_line
from evomerge.events import (
    CandidateRetried,
    Listener,
    WorkerJoined,
    WorkerKilled,
    WorkerLost,
    WorkerRefused,
    WorkerRestarted,
    unheard,
)
from evomerge.versions import versions
from evomerge.workers import Evaluator, Job, Result, run_guarded
from evomerge.workers.ray_address import LOOPBACK_ONLY, given, reach, token_header
from evomerge.workers.waiting import Waiting

_DEPTH = 2  # jobs per actor: one runs, one waits there, so that an actor need not wait for the driver
_BACKOFF = 0.3
_POLL = 5.0
_PATIENCE = 300.0
_ANSWERED = 120.0  # seconds in which a node must say its versions
_GROWTH = 10.0
_COMPANY = 5.0  # for actors beyond the minimum; what an earlier driver held may take longer to come free
_GPUS = ("cuda", "xpu")  # the kinds of devices that Ray counts as GPUs
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(eq=False, slots=True)
class _Actor:
    """What the pool knows of an actor.

    number: the actor's number in events.
    handle: Ray's.
    node: the id of the node on which it has loaded its models; None until then.
    process: the id of the process in which it has loaded them; None until then.
    killed: the id of the process that the pool has killed, in which nothing must be loaded any more.
    busy_since: when it began its present job, in seconds of the monotonic clock.
    gone_since: when it was lost or requested, in the same seconds; of no meaning while the actor is ready.
    holds: the id of the candidate whose merge it holds, or will hold once it has done the jobs that it has.
    """

    number: int
    handle: Any
    node: str | None = None
    process: str | None = None
    killed: str | None = None
    busy_since: float = 0.0
    gone_since: float = 0.0
    holds: str | None = None


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A job on an actor.

    job: the job.
    actor: the actor that has it.
    """

    job: Job
    actor: _Actor


def make(config: SearchConfig, make_worker: Callable[[], Evaluator], address: str | None) -> "RayPool":
    """The Ray pool that a config asks for, with its workers ready.

    config: the search's. By default a worker gets one GPU where the config evaluates on GPUs, and else none.
    make_worker: makes a worker, in the actor's process.
    address: a Ray cluster's; by default RAY_ADDRESS, and without that a Ray that is started here.
    Raises InputError where Ray cannot be reached, or has no room for the workers.
    """
    num_gpus = config.workers.num_gpus
    if num_gpus is None:
        num_gpus = 1.0 if config.evaluation.device.startswith(_GPUS) else 0.0
    return RayPool(config.workers, make_worker, num_gpus, address)


def cluster_device(address: str) -> str:
    """The kind of device that the workers of a cluster can have: a GPU where it has one now, else `cpu`.

    address: a Ray cluster's.
    Raises InputError where Ray cannot be reached.
    """
    connected = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    ray = sys.modules["ray"] if connected else connect(address)
    try:
        resources: dict[str, float] = ray.cluster_resources()
    finally:
        if not connected:
            ray.shutdown()
    if not resources.get("GPU"):
        return "cpu"
    return "xpu" if any(name.startswith("accelerator_type:Intel-GPU") for name in resources) else "cuda"


def versions_by_node(address: str | None) -> dict[str, dict[str, str] | str]:
    """The versions of everything that a score depends on, on each node of a cluster, by the node's name; or why a node
    did not say them.

    address: the cluster's; None for a Ray that is started here.
    Raises InputError where Ray cannot be reached.
    """
    connected = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    ray = sys.modules["ray"] if connected else connect(address)
    try:
        asked = {node["NodeName"]: _asked_for_versions(ray, node["NodeID"]) for node in ray.nodes() if node["Alive"]}
        return {name: _answer(ray, reference) for name, reference in asked.items()}
    finally:
        if not connected:
            ray.shutdown()


def _asked_for_versions(ray: Any, node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    return ray.remote(versions).options(num_cpus=0, scheduling_strategy=there).remote()


def _answer(ray: Any, reference: Any) -> dict[str, str] | str:
    try:
        told: dict[str, str] = ray.get(reference, timeout=_ANSWERED)
    except Exception as error:  # whatever a broken node raises
        return first_line(error)
    return told


def connect(address: str | None) -> Any:
    """Ray, connected to a cluster, or started here.

    address: the cluster's; None to start one here.
    Raises InputError where Ray cannot be reached.
    """
    os.environ.update({key: os.environ.get(key, value) for key, value in _ENVIRONMENT.items()})
    local: dict[str, Any] = {} if address else {"include_dashboard": False}
    try:
        if address:
            reach(address)
        else:
            _keep_to_this_machine()
        import ray

        with _own_sigterm():
            there = address or "local"  # without an address, Ray would look for a cluster that may be gone
            ray.init(address=there, namespace="evomerge", log_to_driver=False, logging_level=logging.ERROR, **local)
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        where = "RAY_ADDRESS" if address == os.environ.get("RAY_ADDRESS") else "--address"
        raise InputError(
            f"{where} {address}: cannot connect to Ray ({first_line(error).rstrip('.')}); start a cluster there, "
            "or leave the address out to start one here."
        ) from None
    return ray


@dataclass
class RayPool:
    """Connects to Ray (or starts it here), places the actors and waits until they have loaded their models.

    See `WorkerPool`.

    config: how many workers there are, and what each may take.
    make_worker: makes a worker, in the actor's process.
    num_gpus: how many GPUs each worker takes.
    address: a Ray cluster's; by default RAY_ADDRESS, and without that a Ray that is started here.
    """

    config: WorkersConfig
    make_worker: Callable[[], Evaluator]
    num_gpus: float
    address: str | None = None
    _actors: list[_Actor] = field(init=False, default_factory=list)
    _free: deque[_Actor] = field(init=False, default_factory=deque)  # each actor once for every job that it can take
    _waiting: Waiting = field(init=False, default_factory=Waiting)
    _deaths: Counter[Any] = field(init=False, default_factory=Counter)  # of actors, by the key of the job
    _running: dict[Any, _Attempt] = field(init=False, default_factory=dict)
    _reviving: dict[Any, _Actor] = field(init=False, default_factory=dict)
    _resting: deque[tuple[float, _Actor]] = field(init=False, default_factory=deque)  # (until when, actor)
    _looked: float = field(init=False, default_factory=time.monotonic)
    _ray: Any = field(init=False, default=None)
    _own_ray: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.listener: Listener = unheard
        self._started_ray = "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
        address = given(self.address)
        self._own_ray = self._started_ray and not address
        try:
            if self._started_ray:
                self._ray = connect(address)
            else:
                self._ray = sys.modules["ray"]
            self._place()
        except BaseException:
            self.close()
            raise

    def _place(self) -> None:
        """Waits until `minimum` actors have a place, and a moment longer for all others that should have room now.

        The rest join later.
        """
        fitting = self._fitting()
        count = self.config.count or max(1, fitting)
        least = min(count, self.config.minimum or self.config.count or 1)
        patience = self.config.placement_timeout
        if self._own_ray:
            self._check_enough(least)  # unlike a cluster, this machine cannot grow, so waiting would not help
            patience = max(patience, _PATIENCE)  # no other work holds resources here, so the machine is only slow
        self._add(count)
        asked = {actor.handle.ready.remote(): actor for actor in self._actors}
        placed, _ = self._ray.wait(list(asked), num_returns=least, timeout=patience)
        if len(placed) < least:
            self._check_enough(least)
            raise InputError(self._busy(least, patience))
        expected = max(least, min(count, fitting))
        placed, waiting = self._ray.wait(list(asked), num_returns=expected, timeout=_COMPANY)
        self._await_models([asked[reference] for reference in placed])
        for reference in waiting:
            self._revive(asked[reference], time.monotonic())

    @property
    def _bundle(self) -> dict[str, float]:
        """The resources that one actor takes."""
        bundle = {"CPU": self.config.num_cpus, "GPU": self.num_gpus}
        return {resource: amount for resource, amount in bundle.items() if amount}

    def _add(self, count: int) -> None:
        actor = self._ray.remote(EvaluationActor).options(
            num_cpus=self.config.num_cpus, num_gpus=self.num_gpus, max_restarts=-1, max_task_retries=0
        )
        maker = self._ray.cloudpickle.dumps(self.make_worker)
        self._actors += [_Actor(len(self._actors) + index, actor.remote(maker)) for index in range(count)]

    def _fitting(self) -> int:
        """How many workers fit on the cluster's nodes."""
        bundle = self._bundle
        if not bundle:
            return 1
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return sum(min(int(node.get(name, 0) / amount + 1e-9) for name, amount in bundle.items()) for node in nodes)

    def _grow(self) -> None:
        """Requests more actors, where the cluster has grown and the config sets no count."""
        now = time.monotonic()
        if self.config.count is not None or self._own_ray or now - self._looked < _GROWTH:
            return
        self._looked = now
        before = len(self._actors)
        self._add(max(0, self._fitting() - before))
        for actor in self._actors[before:]:
            self._revive(actor, now)

    def _check_enough(self, count: int) -> None:
        """Raises InputError where the whole cluster has too few resources for so many workers."""
        total = self._ray.cluster_resources()
        for name, amount in self._bundle.items():
            if total.get(name, 0) < amount * count:
                raise InputError(
                    f"workers: {count} worker(s) of {amount:g} {name} each need {amount * count:g} {name}, but the Ray "
                    f"cluster has {total.get(name, 0):g}; lower workers.count or workers.num_{name.lower()}s, "
                    "or add nodes."
                )

    def _busy(self, count: int, patience: float) -> str:
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in self._bundle.items())
        return (
            f"workers: {count} worker(s) of {wanted} each found no free place in {patience:g} s: other work "
            "holds the cluster's resources, or its machines are slow to start workers; wait for it, lower "
            "workers.count, or raise workers.placement_timeout."
        )

    def _await_models(self, actors: list[_Actor]) -> None:
        """Has actors load their models in parallel, and waits for all of them. Actors that die while they load may try
        again, as long as others live."""
        loading = [(actor, actor.handle.load.remote()) for actor in actors]
        reason = ""
        for actor, reference in loading:
            try:
                problem, node, process = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                reason = first_line(error)
                self._revive(actor, time.monotonic())
                continue
            if problem is not None:
                raise InputError(problem)
            actor.node, actor.process = node, process
        loaded = [actor for actor in self._actors if actor.node is not None]
        if not loaded:
            raise WorkFailed(f"workers: a worker died while it loaded the models ({reason}).")
        self._free.extend(actor for _ in range(_DEPTH) for actor in loaded)

    @property
    def size(self) -> int:
        """How many actors there are, without those that are gone or have not joined yet; at least 1."""
        return max(1, len(self._actors) - len(self._reviving) - len(self._resting))

    def submit(self, job: Job) -> None:
        """Takes a job, which goes to the next free actor. Actors that have nothing to do help with the candidates of
        others only in `wait`, since more candidates may be submitted until then."""
        self._waiting.add(job)
        self._dispatch()

    def drop(self, job: Job) -> None:
        """Forgets all shards of a job that no actor has."""
        self._waiting.drop(job)

    def _dispatch(self, helping: bool = False) -> None:
        """Hands waiting jobs to actors.

        helping: whether actors that have nothing to do may help with candidates that only others hold.
        """
        for helps in (False, True) if helping else (False,):
            while len(self._waiting) and self._started(helps):
                pass

    def _started(self, helps: bool) -> bool:
        """Whether there was a job for a free actor, which then has it. Actors that have nothing to do come first."""
        room = Counter(self._free)
        held = Counter(actor.holds for actor in self._actors if actor.holds is not None)
        for actor in sorted(room, key=lambda actor: -room[actor]):
            job = self._waiting.take(actor.holds, held, helps and room[actor] == _DEPTH)
            if job is not None:
                self._start(job, actor)
                return True
        return False

    def _start(self, job: Job, actor: _Actor) -> None:
        """Hands a job to an actor."""
        self._free.remove(actor)
        if not self._held(actor):
            actor.busy_since = time.monotonic()
        if not job.parts:
            actor.holds = job.candidate.id
        try:
            reference = actor.handle.run.remote(job)
        except self._full as error:
            raise WorkFailed(_no_room(error)) from None
        self._running[reference] = _Attempt(job, actor)

    def _held(self, actor: _Actor) -> list[Any]:
        """The references of an actor's jobs. The first job is running."""
        return [reference for reference, attempt in self._running.items() if attempt.actor is actor]

    @property
    def _full(self) -> tuple[type[Exception], ...]:
        errors = self._ray.exceptions
        return errors.ObjectStoreFullError, errors.OutOfDiskError

    def wait(self) -> tuple[Job, Result]:
        """The next job to finish, and its result. While it waits, lost actors are revived and new actors join.

        Raises WorkFailed where all actors have been gone for too long, or the cluster has no room for results.
        """
        while True:
            self._grow()
            self._wake()
            self._dispatch(helping=True)
            overdue = self._overdue()
            if overdue is not None:
                return overdue
            watched = [*self._running, *self._reviving]
            if not watched:
                time.sleep(_BACKOFF)
                continue
            ready, _ = self._ray.wait(watched, num_returns=1, timeout=_BACKOFF if self._resting else self._poll)
            if not ready:
                self._check_patience()
            elif ready[0] in self._reviving:
                self._revived(ready[0])
            else:
                finished = self._finished(ready[0])
                if finished is not None:
                    return finished

    def _finished(self, reference: Any) -> tuple[Job, Result] | None:
        """The job and its result; None where its actor died and the job has been queued again."""
        actor = self._running[reference].actor
        try:
            result: Result = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, WorkerPoisoned):
                self._kill(actor)
                return self._died(actor, str(cause))
            if isinstance(cause, self._full):
                raise WorkFailed(_no_room(cause)) from None
            raise cause if isinstance(cause, EvomergeError) else WorkFailed(first_line(cause or error)) from None
        except self._full as error:
            raise WorkFailed(_no_room(error)) from None
        except self._ray.exceptions.RayError as error:
            return self._died(actor, first_line(error))
        attempt = self._running.pop(reference)
        actor.busy_since = time.monotonic()
        self._free.append(actor)
        self._dispatch()
        return attempt.job, result

    def _kill(self, actor: _Actor) -> None:
        """Has Ray restart an actor. Ray ends the old process in its own time; it must not take another job."""
        actor.killed = actor.process
        self._ray.kill(actor.handle, no_restart=False)

    def _died(self, actor: _Actor, reason: str) -> tuple[Job, Result] | None:
        """Queues the jobs of a dead actor again.

        The first job was running, so the death counts against this job alone, unless the node died. Once enough deaths
        count against it, the job is returned as failed.
        """
        lost = not any(node["Alive"] and node["NodeID"] == actor.node for node in self._ray.nodes())
        self.listener(WorkerLost(actor.number, actor.node, lost, reason))
        first = self._release(actor)
        self._deaths[first.job.key] += not lost
        deaths = self._deaths[first.job.key]
        if deaths >= self.config.attempts:
            return first.job, failure(f"took {deaths} workers down ({reason})")
        self._waiting.put_back([first.job])
        self.listener(CandidateRetried(first.job.candidate.id, first.job.study, deaths))
        return None

    def _release(self, actor: _Actor) -> _Attempt:
        """The job that a dead actor was running. Its other jobs are queued for any actor, and it is revived."""
        self._revive(actor, time.monotonic())
        self._free = deque(free for free in self._free if free is not actor)
        first, *queued = [self._running.pop(reference) for reference in self._held(actor)]
        self._waiting.put_back(attempt.job for attempt in queued)
        actor.holds = None
        return first

    @property
    def _poll(self) -> float:
        return _POLL if self.config.time_limit is None else min(_POLL, self.config.time_limit / 4)

    def _overdue(self) -> tuple[Job, Result] | None:
        """Kills an actor whose job has taken too long, and returns the job as failed; None where no job has."""
        limit = self.config.time_limit
        if limit is None:
            return None
        late = time.monotonic() - limit
        for actor in dict.fromkeys(attempt.actor for attempt in self._running.values()):
            if actor.busy_since >= late:
                continue
            if self._ray.wait(self._held(actor)[:1], timeout=0)[0]:
                continue  # the job has finished, and its result only waits to be fetched
            self._kill(actor)
            job = self._release(actor).job
            reason = f"took longer than workers.time_limit, which is {limit:g} s"
            self.listener(WorkerKilled(actor.number, actor.node, job.candidate.id, reason))
            return job, failure(reason)
        return None

    def _revive(self, actor: _Actor, since: float) -> None:
        """Has a restarted or new actor load its models. It takes jobs as soon as it has loaded them."""
        actor.gone_since = since
        self._reviving[actor.handle.load.remote(actor.killed)] = actor

    def _revived(self, reference: Any) -> None:
        actor = self._reviving.pop(reference)
        try:
            problem, node, process = self._ray.get(reference)
        except self._ray.exceptions.RayError:
            self._check_patience(actor)
            self._resting.append((time.monotonic() + _BACKOFF, actor))
            return
        if problem is None:
            self._free.extend([actor] * _DEPTH)
            event = WorkerRestarted if actor.node is not None else WorkerJoined
            actor.node, actor.process = node, process
            seconds = round(time.monotonic() - actor.gone_since, 3)
            self.listener(event(actor.number, node, seconds))
        elif self._running or self._free or self._reviving:
            self._ray.kill(actor.handle)  # its node lacks something that the others have: they go on
            self.listener(WorkerRefused(actor.number, node, problem))
        else:
            raise WorkFailed(problem)

    def _wake(self) -> None:
        """Tries again to revive the actors that had not come back, without holding up the others."""
        while self._resting and self._resting[0][0] <= time.monotonic():
            _, actor = self._resting.popleft()
            self._revive(actor, actor.gone_since)

    def _check_patience(self, *more: _Actor) -> None:
        """Raises WorkFailed where every worker has been gone for too long."""
        gone = [*more, *self._reviving.values(), *(actor for _, actor in self._resting)]
        latest = max((actor.gone_since for actor in gone), default=time.monotonic())
        if not self._running and not self._free and time.monotonic() - latest > _PATIENCE:
            raise WorkFailed(
                f"workers: all {self.size} are gone and none has come back in {_PATIENCE:g} s; add nodes and resume."
            )

    def close(self) -> None:
        """Kills the actors, and shuts Ray down where this pool started it or connected to it."""
        for actor in self._actors:
            self._ray.kill(actor.handle)
        self._actors.clear()
        if self._started_ray and self._ray is not None and self._ray.is_initialized():
            self._ray.shutdown()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """A context after which our SIGTERM handler is back, which ends a search cleanly. Ray replaces it."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _keep_to_this_machine() -> None:
    """Makes the Ray that is started here listen on loopback only, and require a token that is written to no file."""
    os.environ |= LOOPBACK_ONLY
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token" and not token_header():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _no_room(error: Exception) -> str:
    return (
        f"workers: the Ray cluster has no room for results ({first_line(error).rstrip('.')}); nothing was lost: free "
        "its object store or its disks, then resume."
    )


class EvaluationActor:
    """The actor's code. Its worker is made in the actor's own process, by `load` or on first use after a restart."""

    def __init__(self, maker: bytes) -> None:
        """maker: the function that makes the worker, pickled. Ray does not unpickle it, since that may import torch,
        and an actor should get its place before that.
        """
        self._maker = maker
        self._worker: Evaluator | None = None

    def ready(self) -> None:
        """Returns nothing, as soon as the actor has a place."""

    def load(self, killed: str | None = None) -> tuple[str | None, str, str]:
        """Loads the models. Returns why this failed (None where it did not), and the ids of node and process.

        killed: the id of a process that is about to end. Where it is this one, nothing is loaded and RuntimeError is
            raised.
        """
        import ray

        context = ray.get_runtime_context()
        node, process = context.get_node_id(), context.get_worker_id()
        if process == killed:
            raise RuntimeError("this process is about to end")
        try:
            self._make_worker()
        except EvomergeError as error:
            return str(error), node, process
        return None, node, process

    def run(self, job: Job) -> Result:
        """The result of a job; see `run_guarded`."""
        return run_guarded(self._make_worker(), job)

    def _make_worker(self) -> Evaluator:
        """The worker; the first call makes it."""
        if self._worker is None:
            import ray

            make: Callable[[], Evaluator] = ray.cloudpickle.loads(self._maker)
            self._worker = make()
        return self._worker
