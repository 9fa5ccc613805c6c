"""The schedule that follows gradients: a step is a fixed number of shards, and now and then a candidate is scored.

The mean loss of a mini-batch is divided into shards, which workers share. Their gradients are added up in the order of
the shards, as the archive has rounded them. So the path depends neither on timing nor on the number of workers, and a
replay takes it again. Every few steps, the mean of the last genomes becomes a candidate that is scored on all search
items; the stage ends when these scores stop rising.

Constraints become parts of the loss. The multiplier of a constraint rises while the candidate's loss on it is above
that of the named parent, plus what `retain` lets go, and falls while it is below (dual ascent: Boyd et al. 2011,
section 2.1).
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evomerge.archive.gradients import GradientRecord, digest_of, rounded
from evomerge.candidate import Candidate, Descent, Evaluation, Gradient, Sources, learned_id
from evomerge.config.search import SearchConfig
from evomerge.events import Listener, Stepped, Warned
from evomerge.optimizers.base import Problem
from evomerge.optimizers.learned import Learner
from evomerge.optimizers.make import FORWARD_PASSES, passes_before
from evomerge.optimizers.ranking import Incumbent
from evomerge.search.controls import BASE, PARENT
from evomerge.search.criteria import Criteria, references, sign_of
from evomerge.spaces import Genome, SearchSpace
from evomerge.spaces.sensitivity import Sensitivity, sensitivity
from evomerge.workers import Job, Result

_ASCENT = 2.0  # by how much a multiplier rises per step and unit of loss
_SMOOTHING = 0.8  # of the losses that multipliers follow, from step to step


@dataclass(frozen=True, slots=True)
class LossLimit:
    """A constraint on a loss.

    name: the metric's name.
    parent: the candidate whose loss is the limit.
    slack: by how much the candidate's loss may be larger, in nats.
    """

    name: str
    parent: Candidate
    slack: float


@dataclass(slots=True)
class _Step:
    """A step whose shards are not all in.

    candidate: whose gradient is asked for.
    descent: the first shard's.
    records: what has come in, by shard.
    """

    candidate: Candidate
    descent: Descent
    records: dict[int, GradientRecord] = field(default_factory=dict)

    @property
    def failed(self) -> str | None:
        """Why a shard failed; None where none did."""
        return next((record.error for _, record in sorted(self.records.items()) if record.error is not None), None)

    @property
    def losses(self) -> dict[str, float]:
        """The mean loss of each metric."""
        parts = [record.losses for _, record in sorted(self.records.items())]
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    @property
    def seconds(self) -> float:
        return sum(record.seconds for record in self.records.values())

    @property
    def gradient(self) -> NDArray[np.float64]:
        """The derivative of the weighted sum of losses by each gene, added up in the order of the shards."""
        total = np.zeros_like(self.records[0].slopes)
        for _, record in sorted(self.records.items()):
            total = total + record.slopes
        return total


class Learning:
    """The steps of a learned stage. See `Schedule`.

    cost: what the stage has cost so far, in forward passes over all search items.
    finished: whether it has come to its end.
    early: why it has ended before its last step; empty where it has not.
    """

    def __init__(
        self,
        config: SearchConfig,
        space: SearchSpace,
        names: Sequence[str],
        problem: Problem,
        criteria: Criteria,
        limits: Sequence[LossLimit],
        listener: Listener,
        sources: Sources = (),
    ) -> None:
        """config: the search's.
        space: decodes genomes.
        names: the names of the output's tensors.
        problem: the genes and the start, with what controls scored.
        criteria: those of the search items.
        limits: the constraints on losses.
        listener: is told of steps.
        sources: for each objective, the models whose layers are compared with the merge's, with their weights.
        """
        self._config, self._space, self._criteria, self._listener = config, space, criteria, listener
        self._names, self._sources = names, sources
        self._problem, self._limits = problem, deque(limits)
        self._settings = config.optimizer.learning
        stage = config.optimizer.stages[0] if config.optimizer.stages else None
        allowed = np.array([stage is None or gene.kind in stage.genes for gene in space.genes])
        self._sensitivity = sensitivity(space, problem.start, names, allowed)
        self._learner = Learner(self._settings, space.genes, problem.start, self._sensitivity.moves)
        self._multipliers = Multipliers(limits)
        self._queue: deque[Job] = deque()
        self._step: _Step | None = None
        self._candidates: dict[int, Candidate] = {}  # by step
        self._scored: dict[int, Evaluation | None] = {}
        self._ending = not self._sensitivity.moves.any()
        self.early = "its loss depends on no gene" if self._ending else ""
        self.cost, self.finished = passes_before(config, follows=True), False
        if problem.known is None:  # as where rows are weighted, so no control lies at the start
            self._score()
        self._go_on()

    @property
    def outcome(self) -> Genome:
        """The best genome so far by the weighted mean on search items, controls among them; shape (dimension,). Where
        means are equal, the latest step counts, in whatever order scores came."""
        best, ranking = Incumbent(self._problem.start), self._problem.ranking
        if self._problem.known is not None:
            best.offer(self._problem.known[0], ranking.means(self._problem.known[1]))
        for candidate, evaluation in self.scored:
            best.offer(np.array(candidate.genome)[np.newaxis], ranking.means(self._criteria.told([evaluation])))
        return best.genome

    @property
    def candidates(self) -> int:
        """How many candidates have been handed out."""
        return len(self._scored)

    @property
    def scored(self) -> list[tuple[Candidate, Evaluation]]:
        """The candidates that have been scored, with their evaluations, by step."""
        scored = [(self._candidates[step], evaluation) for step, evaluation in self._scored.items()]
        return [(candidate, evaluation) for candidate, evaluation in scored if evaluation is not None]

    def next(self) -> Job | None:
        """The next job; None while jobs that run must finish first, and at the end."""
        return self._queue.popleft() if self._queue else None

    def arrival(self) -> None:
        """None, since the order of arrival does not count."""

    def record(self, job: Job, result: Result) -> GradientRecord:
        """What the archive keeps of a shard.

        job: the job that asked for its gradient.
        result: what the worker said.
        """
        assert job.descent is not None
        assert isinstance(result, Gradient | Evaluation)
        slopes = self._sensitivity_at(job.candidate).by_gene(result.slopes if isinstance(result, Gradient) else {})
        return GradientRecord(
            step=job.descent.step,
            shard=job.descent.shard,
            genome=digest_of(job.candidate.genome or ()),
            losses=result.losses if isinstance(result, Gradient) else {},
            slopes=rounded(slopes),
            fingerprint=result.fingerprint,
            error=None if isinstance(result, Gradient) else result.error or "failed",
            seconds=result.seconds,
        )

    def receive_gradient(self, record: GradientRecord) -> None:
        """Takes a shard's record, and goes on once the step is complete."""
        step = self._step
        assert step is not None
        step.records[record.shard] = record
        if len(step.records) < step.descent.shards:
            return
        self._step = None
        if step.failed is not None:
            self._ending = True
            what = f"step {step.descent.step}" if step.descent.step > 0 else f"the loss of {step.candidate.id}"
            self.early = f"{what} failed ({step.failed})"
            self._listener(Warned(f"{self.early}, so no more steps along gradients are taken."))
        elif step.descent.step < 0:
            self._multipliers.bound(step.losses)
        else:
            self._follow(step)
        self._go_on()

    def receive(self, job: Job, evaluation: Evaluation) -> None:
        """Takes the scores of a candidate."""
        self._scored[_step_of(job.candidate)] = evaluation
        self._problem.ranking.observe(self._criteria.told([evaluation]))
        self._go_on()

    def _sensitivity_at(self, candidate: Candidate) -> Sensitivity:
        """The sensitivity at a candidate's genome. It is not that at the start only where there are scales."""
        if not self._sensitivity.bends or candidate.genome is None:
            return self._sensitivity
        return sensitivity(self._space, np.array(candidate.genome), self._names, self._sensitivity.moves)

    def _follow(self, step: _Step) -> None:
        self._learner.follow(step.gradient)
        self._multipliers.follow(step.losses)
        self._listener(Stepped(step.descent.step, step.losses, round(step.seconds, 4)))
        if self._learner.step % self._settings.every == 0 or self._learner.step >= self._settings.steps:
            self._score()

    def _score(self) -> None:
        """Hands out the mean of the last genomes as a candidate."""
        genome = self._learner.averaged
        candidate = Candidate(
            id=learned_id(self._learner.step),
            kind="search",
            generation=len(self._scored),
            index=0,
            recipe=self._space.decode(genome),
            genome=tuple(genome.tolist()),
        )
        self._candidates[self._learner.step] = candidate
        self._scored[self._learner.step] = None
        self._queue.append(Job(candidate, "search"))
        self.cost += 1.0

    def _go_on(self) -> None:
        """Asks for the next step, or ends. Whether it ends is decided after a candidate has been handed out, by the
        scores of all earlier candidates, whether later ones are in or not."""
        if self._step is not None:
            return
        earlier = [evaluation for step, evaluation in self._scored.items() if step < self._learner.step]
        if self._learner.step in self._scored:
            if None in earlier:
                return
            if not self._ending and self._learner.step < self._settings.steps and self._stalled(earlier):
                self.early = f"search scores have not risen for {self._settings.patience} candidates along gradients"
            self._ending = self._ending or self._learner.step >= self._settings.steps or bool(self.early)
        if not self._ending:
            self._ask()
        else:
            self.finished = None not in self._scored.values()

    def _stalled(self, earlier: Sequence[Evaluation | None]) -> bool:
        """Whether the last scores have not risen above those before."""
        means = self._criteria.means([evaluation for evaluation in earlier if evaluation is not None])
        patience = self._settings.patience
        return len(means) > patience and max(means[-patience:]) <= max(means[:-patience])

    def _ask(self) -> None:
        """Hands out the shards of the next step, or of the losses that limits depend on."""
        settings = self._settings
        if self._limits:
            limit = self._limits.popleft()
            number = -1 - len(self._limits)
            candidate, weights, share = limit.parent, {limit.name: 0.0}, 1.0
            wanted: tuple[str, ...] = ()
            self.cost += 1.0
        else:
            number = self._learner.step + 1
            candidate, weights, share = self._candidate(number), self._weights(), settings.share
            wanted = self._sensitivity.wanted
            self.cost += FORWARD_PASSES * share
        descents = [
            Descent(number, share, shard, settings.shards, tuple(weights.items()), wanted, self._sources)
            for shard in range(settings.shards)
        ]
        self._step = _Step(candidate, descents[0])
        self._queue.extend(Job(candidate, "search", None, descent) for descent in descents)

    def _candidate(self, step: int) -> Candidate:
        genome = self._learner.genome
        recipe, numbers = self._space.decode(genome), tuple(genome.tolist())
        return Candidate(f"step-{step:04d}", "search", len(self._scored), 0, recipe, numbers)

    def _weights(self) -> dict[str, float]:
        """The weight of each metric's loss: that of the objective, and the multiplier of the constraint."""
        weights = self._config.loss_weights
        for name, multiplier in self._multipliers.values.items():
            weights[name] = weights.get(name, 0.0) + multiplier
        return weights


def _step_of(candidate: Candidate) -> int:
    return int(candidate.id.removeprefix("l"))


def loss_limits(
    config: SearchConfig, controls: Sequence[Candidate], evaluations: Sequence[Evaluation]
) -> list[LossLimit]:
    """The search's constraints as limits on losses. Of several on one metric, the tightest counts.

    config: the search's.
    controls: the essential controls.
    evaluations: theirs, on search items.
    """
    if config.optimizer.learning.loss != "likelihood":
        return []  # an entropy says nothing of what a parent can do
    scored = [
        (candidate, evaluation.scores)
        for candidate, evaluation in zip(controls, evaluations, strict=True)
        if evaluation.scores is not None
    ]
    limits: dict[str, LossLimit] = {}
    for constraint in sorted(config.constraints, key=lambda constraint: constraint.retain):
        sign, named = sign_of(constraint), references(constraint, config)
        among = [(sign * scores[constraint.name], candidate) for candidate, scores in scored if candidate.id in named]
        if among:
            parent = max(among, key=lambda pair: pair[0])[1]
            limits[constraint.name] = LossLimit(constraint.name, parent, -math.log(constraint.retain))
    return list(limits.values())


def sources_of(config: SearchConfig, controls: Sequence[Candidate], evaluations: Sequence[Evaluation]) -> Sources:
    """For each objective, with whose layers those of the merge are compared, and how much each model counts: by how
    much it scores better than the base on the objective. Where none does, it is the base alone.

    config: the search's.
    controls: the essential controls.
    evaluations: theirs, on search items.
    """
    if config.optimizer.learning.loss != "activations":
        return ()
    scored = {candidate.id: evaluation.scores for candidate, evaluation in zip(controls, evaluations, strict=True)}
    parents = {reference: scored[f"{PARENT}-{name}"] for name, reference in config.models.items()}
    base, sources = scored[BASE], dict[str, tuple[tuple[str, float], ...]]()
    for objective in config.objectives:
        if objective.cost is None:
            sign, name = sign_of(objective), objective.name
            values = {reference: sign * scores[name] for reference, scores in parents.items() if scores is not None}
            zero = sign * base[name] if base is not None else min(values.values(), default=0.0)
            better = {reference: value - zero for reference, value in values.items() if value > zero}
            better = better or {config.base: 1.0}
            total = sum(better.values())
            sources[objective.name] = tuple((reference, gain / total) for reference, gain in better.items())
    return tuple(sources.items())


class Multipliers:
    """The weights of constraints in the loss.

    values: the multiplier of each constrained metric, by name.
    """

    def __init__(self, limits: Sequence[LossLimit]) -> None:
        self.values = dict.fromkeys((limit.name for limit in limits), 0.0)
        self._slack = {limit.name: limit.slack for limit in limits}
        self._bounds: dict[str, float] = {}
        self._smoothed: dict[str, float] = {}

    def bound(self, losses: Mapping[str, float]) -> None:
        """Takes the losses of a parent, above which a candidate's loss counts as too large."""
        for name, loss in losses.items():
            self._bounds[name] = loss + self._slack[name]

    def follow(self, losses: Mapping[str, float]) -> None:
        """Takes the losses of a step."""
        for name in self.values:
            before = self._smoothed.get(name, losses[name])
            self._smoothed[name] = _SMOOTHING * before + (1 - _SMOOTHING) * losses[name]
            beyond = self._smoothed[name] - self._bounds[name]
            self.values[name] = max(0.0, self.values[name] + _ASCENT * beyond)
