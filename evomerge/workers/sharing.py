"""Sharing: a pool whose workers share the items of a candidate.

An evaluation is divided into a fixed number of shards. Each is scored by whichever worker is free, and when the last is
in, a worker joins them: lm-eval's own filters, metrics and aggregations see the answers to all items in their order, as
if one worker had scored them. Shards are made of whole batches, and a batch gives the same answers wherever it runs. So
the number of shards changes no bit of an evaluation, but for the seconds that it took.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from evomerge.candidate import Part, Shard
from evomerge.events import Listener
from evomerge.workers import Job, Result, WorkerPool


@dataclass
class Sharing:
    """A pool that divides evaluations over the workers of another pool. See `WorkerPool`.

    pool: the other pool.
    shards: into how many shards the evaluation of a whole split is divided.
    """

    pool: WorkerPool
    shards: int
    _parts: dict[object, dict[int, Part]] = field(init=False, default_factory=dict)  # by the key of the whole job

    @property
    def listener(self) -> Listener:
        """The other pool's."""
        return self.pool.listener

    @listener.setter
    def listener(self, listener: Listener) -> None:
        self.pool.listener = listener

    @property
    def size(self) -> int:
        """How many workers there are. Workers share what is left where there are fewer jobs."""
        return self.pool.size

    def submit(self, job: Job) -> None:
        """Takes a job and hands on its shards."""
        for shard in self._divided(job):
            self.pool.submit(shard)

    def _divided(self, job: Job) -> Iterator[Job]:
        count = math.ceil(self.shards * (job.subset.share if job.subset is not None else 1.0))
        if count == 1 or job.descent is not None:  # steps along gradients have shards of their own
            yield job
            return
        self._parts[job.key] = {}
        for number in range(count):
            yield replace(job, shard=Shard(number, count))

    def wait(self) -> tuple[Job, Result]:
        """The next whole job to finish, and its result. The first failure of a shard is that of the candidate, and its
        other shards are dropped."""
        while True:
            job, result = self.pool.wait()
            whole = job.whole
            if job.is_whole:
                return job, result
            if whole.key not in self._parts:
                continue  # a shard that ran while another one failed
            if not isinstance(result, Part):
                del self._parts[whole.key]
                self.pool.drop(whole)
                return whole, result
            self._received(whole, result)

    def _received(self, whole: Job, part: Part) -> None:
        """Keeps a part, and has all of them joined once the last is in."""
        parts = self._parts[whole.key]
        parts[part.shard.number] = part
        if len(parts) == part.shard.count:
            self.pool.submit(replace(whole, parts=tuple(own for _, own in sorted(parts.items()))))
            parts.clear()

    def drop(self, job: Job) -> None:
        """Forgets a job that does not run yet."""
        self._parts.pop(job.key, None)
        self.pool.drop(job)

    def close(self) -> None:
        """Stops all workers, whatever they are doing."""
        self.pool.close()
