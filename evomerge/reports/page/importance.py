"""Which genes matter: how much of the variance of the mean each gene explains, by optuna's fANOVA.

Where there are many genes, those of one group count together, by the mean of their values.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from evomerge.archive.archive import Record, steering
from evomerge.quiet import quiet
from evomerge.search.best import means
from evomerge.search.results import Results
from evomerge.spaces import Gene

MOST_GENES = 50  # that are looked at one by one
_FEWEST, _MOST = 12, 1500  # candidates that say something about genes; and that are looked at
_SEED = 0

Value = float | int | str


@dataclass(frozen=True, slots=True)
class Feature:
    """A gene, or a group of genes that count together.

    name: the gene's, or the group's.
    genes: the names of its genes.
    low: the least value.
    high: the largest value.
    choices: the choices of a categorical gene; empty for others.
    """

    name: str
    genes: tuple[str, ...]
    low: float
    high: float
    choices: tuple[str, ...] = ()

    def of(self, genes: Mapping[str, Value]) -> Value | None:
        """The feature's value; None where a candidate has none of its genes."""
        found = [genes[name] for name in self.genes if name in genes]
        if not found:
            return None
        if self.choices:
            return found[0]
        return min(max(fmean(float(value) for value in found), self.low), self.high)  # a mean may be rounded past them


@dataclass(frozen=True, slots=True)
class Features:
    """The genes of a search, one by one or in groups, and their values.

    features: what there is.
    grouped: whether they are groups.
    candidates: the ids of the candidates that were scored on all search items and have genes.
    values: by candidate, a value for each feature; None where it does not count.
    means: by candidate, its mean on search items.
    """

    features: tuple[Feature, ...]
    grouped: bool
    candidates: tuple[str, ...]
    values: tuple[tuple[Value | None, ...], ...]
    means: tuple[float, ...]


def features(results: Results, genes: Sequence[Gene]) -> Features:
    """The features of a search.

    results: the search's.
    genes: the genes of its space.
    """
    grouped = len(genes) > MOST_GENES
    found = tuple(_groups(genes) if grouped else map(_alone, genes))
    records = [record for record in results.archive.records(steering(results.config)) if _tells(record)]
    told = [results.archive.genes(record.candidate) or {} for record in records]
    return Features(
        found,
        grouped,
        tuple(record.candidate.id for record in records),
        tuple(tuple(feature.of(genes) for feature in found) for genes in told),
        tuple(means(records, results.criteria(steering(results.config)))),
    )


def importances(features: Features) -> dict[str, float] | str:
    """The share of the mean's variance that each feature explains, largest first; or a sentence that says why it cannot
    be known."""
    count = len(features.candidates)
    if count < _FEWEST:
        return f"Only {count} candidates with genes were scored on all search items; {_FEWEST} are needed."
    if max(features.means) - min(features.means) < 1e-12:
        return "All candidates have the same mean, so that no gene makes a difference."
    always = [
        number
        for number in range(len(features.features))
        if len({row[number] for row in features.values}) > 1 and all(row[number] is not None for row in features.values)
    ]
    if not always:
        return "No gene counts in every candidate and varies, so that none can be compared with the others."
    return _fanova(features, always)


def _fanova(features: Features, numbers: Sequence[int]) -> dict[str, float]:
    """Of very many candidates, evenly spaced ones are looked at."""
    import optuna

    count = len(features.candidates)
    chosen = range(count) if count <= _MOST else sorted({round(i * (count - 1) / (_MOST - 1)) for i in range(_MOST)})
    with quiet():
        study = optuna.create_study(direction="maximize")
        for row in chosen:
            values = {str(number): features.values[row][number] for number in numbers}
            study.add_trial(
                optuna.trial.create_trial(
                    value=features.means[row],
                    params=values,
                    distributions={str(number): _distribution(features.features[number]) for number in numbers},
                )
            )
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=_SEED)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    ordered = sorted(found.items(), key=lambda pair: (-pair[1], int(pair[0])))
    return {features.features[int(number)].name: float(share) for number, share in ordered}


def _distribution(feature: Feature) -> Any:
    from optuna import distributions

    if feature.choices:
        return distributions.CategoricalDistribution(feature.choices)
    return distributions.FloatDistribution(feature.low, feature.high)


def _tells(record: Record) -> bool:
    return record.candidate.genome is not None and not record.evaluation.failed


def _alone(gene: Gene) -> Feature:
    return Feature(gene.name, (gene.name,), gene.low, gene.high, gene.choices)


def _groups(genes: Sequence[Gene]) -> list[Feature]:
    """Genes of one kind, model and group of tensors together; of one kind and model where these are still too many.
    Categorical genes stay alone, since choices have no mean."""
    fine = _together(genes, fine=True)
    return fine if len(fine) <= MOST_GENES else _together(genes, fine=False)


def _together(genes: Sequence[Gene], fine: bool) -> list[Feature]:
    members: dict[str, list[Gene]] = defaultdict(list)
    for gene in genes:
        members[gene.name if gene.choices else _group_name(gene, fine)].append(gene)
    return [
        Feature(
            name,
            tuple(gene.name for gene in group),
            min(gene.low for gene in group),
            max(gene.high for gene in group),
            group[0].choices,
        )
        for name, group in members.items()
    ]


def _group_name(gene: Gene, fine: bool) -> str:
    """The name of a gene without the tensor; a gene's name is its kind, often a model, and what it governs."""
    words = gene.name.split(":")
    start = words[:2] if len(words) > 2 else words[:1]
    return ":".join([*start, gene.group] if fine and gene.group else start)
