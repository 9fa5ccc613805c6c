"""Which models take part in a merge, and in what role: genes of their own where a search leaves it open.

A method that takes any number of models takes all of them. With `participate`, each model has a gene that says whether
it takes part; where too few do, the first of the other models join. A method between two models has a gene for each
end: `from` is the base or a model, and `to` is a model. Where both are the same model, `from` is the base. A method
that takes two models besides the base has one gene, `pair`, where there are more of them.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

from evomerge.merging.methods.base import Method
from evomerge.spaces import TAKE, Condition, Gene, categorical

BASE, OUT, IN = "base", "out", "in"
FROM, TO, PAIR = "from", "to", "pair"
_GROUP = "models"


def between_two(method: Method) -> bool:
    """Whether a method takes the base and one model, or one model alone."""
    return method.most == 1


def takes_pair(method: Method) -> bool:
    """Whether a method takes two models besides the base."""
    return method.least == method.most == 2


class Participants:
    """The models of a search, by name, for the methods that it uses."""

    def __init__(self, models: Sequence[str], methods: Sequence[Method], participate: bool) -> None:
        """models: the names of the models.
        methods: the methods that candidates may use.
        participate: whether the search chooses which models take part.
        """
        self._models = tuple(models)
        self._methods = tuple(methods)
        self._chosen = participate and len(models) > 1
        two_each = combinations(self._models, 2) if len(models) > 2 else ()
        self._pairs = {f"{first} and {second}": (first, second) for first, second in two_each}

    def genes(self) -> list[Gene]:
        """The genes that say which models take part; empty where the search does not choose."""
        return [*self._ends(), *self._pair(), *self._takes()]

    def _pair(self) -> list[Gene]:
        users = [method for method in self._methods if takes_pair(method)]
        if not users or not self._pairs:
            return []
        names = tuple(self._pairs)
        return [categorical(PAIR, PAIR, _GROUP, names, names[0], self.under(users))]

    def _ends(self) -> list[Gene]:
        if len(self._models) == 1:
            return []
        between = [method for method in self._methods if between_two(method)]
        ends = [
            (FROM, (BASE, *self._models), [method for method in between if method.needs_base]),
            (TO, self._models, between),
        ]
        return [
            categorical(name, name, _GROUP, choices, choices[0], self.under(users))
            for name, choices, users in ends
            if users
        ]

    def _takes(self) -> list[Gene]:
        users = [
            method
            for method in self._methods
            if not between_two(method) and not takes_pair(method) and method.least < len(self._models)
        ]
        if not self._chosen or not users:
            return []
        when = self.under(users)
        return [categorical(_take(model), TAKE, _GROUP, (OUT, IN), IN, when) for model in self._models]

    def under(self, users: Sequence[Method]) -> tuple[Condition, ...]:
        """The condition that one of certain methods is used; empty where every method is among them."""
        names = tuple(method.name for method in users)
        return () if len(names) == len(self._methods) else (Condition("method", names),)

    def part(self, model: str, users: Sequence[Method]) -> tuple[Condition, ...]:
        """The conditions under which a model takes part in a merge by one of certain methods.

        model: the model's name.
        users: the methods.
        """
        if self._pairs and all(map(takes_pair, users)):
            taken: tuple[Condition, ...] = (Condition(PAIR, self._pairs_of(model)),)
        elif not all(map(between_two, users)):
            taken = (Condition(_take(model), (IN,)),) if self._chosen else ()
        else:
            taken = (Condition(TO, (model,)),) if len(self._models) > 1 else ()
        return (*self.under(users), *taken)

    def _pairs_of(self, model: str) -> tuple[str, ...]:
        return tuple(name for name, pair in self._pairs.items() if model in pair)

    def chosen(self, method: Method, choices: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
        """The base (the name of a model, or `base`) and the models of a merge.

        method: the method that merges.
        choices: the choices of categorical genes, by gene.
        """
        if between_two(method):
            to = choices.get(TO, self._models[0])
            source = choices.get(FROM, BASE) if method.needs_base else BASE
            return (BASE if source == to else source), (to,)
        if self._pairs and takes_pair(method):
            return BASE, self._pairs[choices[PAIR]]
        taken = [model for model in self._models if choices.get(_take(model), IN) == IN]
        missing = [model for model in self._models if model not in taken][: max(0, method.least - len(taken))]
        return BASE, tuple(model for model in self._models if model in (*taken, *missing))

    def standing_for(self, weights: Mapping[str, float]) -> dict[str, str]:
        """The choices that come nearest to weights, by gene; empty where all weights are 0.

        weights: the weight of each model, by name.
        """
        heaviest = sorted(
            (name for name in self._models if weights.get(name, 0.0) > 0), key=lambda name: -weights[name]
        )
        if not heaviest:
            return {}
        takes = {_take(name): IN if name in heaviest else OUT for name in self._models}
        first, second = [BASE, *heaviest][:2] if len(heaviest) == 1 else heaviest[:2]
        near = sorted(self._pairs, key=lambda name: -sum(max(weights.get(own, 0.0), 0.0) for own in self._pairs[name]))
        return {FROM: first, TO: second, **takes, **({PAIR: near[0]} if near else {})}


def _take(model: str) -> str:
    return f"{TAKE}:{model}"
