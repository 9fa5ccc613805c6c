"""What numbers of a diagnosis mean, as plain sentences. Limits that a paper gives are named with it."""

from collections.abc import Iterator

from evomerge.diagnosis.activations import LayerSimilarity
from evomerge.diagnosis.weights import LARGE, Differences, Relation, WeightDiagnosis

# Two models of one shape that were trained apart are about 1.4 norms apart, and fine-tunes rarely more than 0.2.
_STRANGER, _FAR = 0.7, 0.25
_TOO_LARGE = 0.01  # the share of large elements from which DARE is warned of
_OPPOSITE, _ALIKE, _CONFLICTS = -0.1, 0.8, 0.6
_SPARE_LAYER = 0.98


def sentences(diagnosis: WeightDiagnosis, layers: dict[str, LayerSimilarity] | None, methods: set[str]) -> list[str]:
    """What a user should know before a search.

    diagnosis: of the weights.
    layers: how much each layer of each model changes its input, by model; None where it was not measured.
    methods: the merge methods that the search may use.
    """
    found = [text for name, own in diagnosis.models.items() for text in _of_model(name, own, methods)]
    found += [text for relation in diagnosis.relations for text in _of_pair(relation)]
    found += [text for name, own in (layers or {}).items() for text in _of_layers(name, own)]
    return found


def _of_model(name: str, own: Differences, methods: set[str]) -> Iterator[str]:
    if own.whole == 0:
        yield f"{name} has the weights of the base, so it adds nothing to a merge."
    elif own.whole > _STRANGER:
        yield (
            f"{name} is {own.whole:.2f} of the base's norm away from it. Models that were trained apart are about 1.4 "
            "away, so this is probably no fine-tune of this base. Check `base`, or bring it nearer (`align`)."
        )
    elif own.whole > _FAR:
        yield (
            f"{name} is {own.whole:.2f} of the base's norm away from it, which is far for a fine-tune. Expect small "
            "weights to work best, or merge layers instead (space.kind: data_flow)."
        )
    dare = sorted(method for method in methods if method.startswith("dare"))
    if own.large > _TOO_LARGE and own.whole <= _STRANGER and dare:
        yield (
            f"{own.large:.1%} of the weights of {name} differ by more than {LARGE} from the base. Dropping such "
            f"changes at random fails (Yu et al. 2024), so keep densities near 1, or use another method than {dare[0]}."
        )


def _of_pair(relation: Relation) -> Iterator[str]:
    one, other = relation.models
    if relation.whole < _OPPOSITE:
        yield (
            f"{one} and {other} cancel: the cosine of their changes is {relation.whole:.2f}. A sum of both loses of "
            "each. Let the search leave one out (space.participate), or let it choose by group."
        )
    elif relation.whole > _ALIKE:
        yield (
            f"{one} and {other} change nearly the same: the cosine of their changes is {relation.whole:.2f}. Together "
            "they count double, so expect weights near one half."
        )
    if relation.all_conflicts > _CONFLICTS:
        yield (
            f"Where both {one} and {other} change most, {relation.all_conflicts:.0%} of the signs are opposite. "
            "Methods that elect signs (ties, dare_ties) are made for that (Yadav et al. 2023)."
        )


def _of_layers(name: str, own: LayerSimilarity) -> Iterator[str]:
    spare = [str(layer) for layer, similarity in enumerate(own.similarity) if similarity > _SPARE_LAYER]
    if spare:
        yield (
            f"Layers {', '.join(spare)} of {name} hardly change what passes through them. Such layers can often be "
            "left out or moved (Men et al. 2024), so they are where a data-flow search has room."
        )
