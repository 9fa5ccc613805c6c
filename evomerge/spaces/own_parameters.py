"""Genes for parameters that belong to one method, such as slerp's `t`, sce's `select_topk` and karcher's `max_iter`.

The parameters of methods without weights are searched unless they are fixed; other methods' parameters are searched
where the search file names them. Numbers vary by group of tensors, and by model where the method takes them by model.
Whole numbers and switches have one value for the whole merge.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evomerge.config.base import GeneChange, GeneConfig
from evomerge.config.documents import validate
from evomerge.config.spaces import ParameterSpaceConfig
from evomerge.errors import InputError, choices
from evomerge.merging.methods import OMEGA
from evomerge.merging.methods.base import Method, Parameter
from evomerge.spaces import Condition, Gene, categorical

_SWITCH = ("false", "true")


@dataclass(frozen=True, slots=True)
class OwnParameter:
    """One parameter of one method in a search.

    method: the method.
    parameter: the parameter.
    bounds: its bounds, or the value at which it is fixed.
    """

    method: Method
    parameter: Parameter
    bounds: GeneConfig

    @property
    def kind(self) -> str:
        """The kind of its genes, such as `slerp.t`."""
        return f"{self.method.plain}.{self.parameter.name}"

    @property
    def by_tensor(self) -> bool:
        """Whether it varies by group of tensors."""
        return self.parameter.kind is float

    @property
    def by_model(self) -> bool:
        """Whether it varies by model."""
        return self.method.takes(self.parameter.name)

    def name(self, group: str, model: str | None) -> str:
        """The name of a gene.

        group: the group of tensors, which counts where the parameter varies by group.
        model: the model, which counts where the parameter varies by model.
        """
        words = [self.kind, model if self.by_model else None, group if self.by_tensor else None]
        return ":".join(word for word in words if word is not None)

    def value(self, values: Mapping[str, float], group: str, model: str | None) -> float:
        """The parameter's value: that of its gene, or the one at which it is fixed.

        values: the genome's values, by gene.
        group: the group of tensors.
        model: the model; None for a parameter that models share.
        """
        fixed = self.bounds.fixed
        return self.parameter.written(values[self.name(group, model)]) if fixed is None else fixed

    def gene(self, group: str, model: str | None, when: tuple[Condition, ...]) -> Gene:
        """The gene of a group of tensors and a model.

        group: the group of tensors, which counts where the parameter varies by group.
        model: the model, which counts where the parameter varies by model.
        when: the conditions under which the gene counts.
        """
        name, low, high, start = self.name(group, model), self.bounds.low, self.bounds.high, self.bounds.start
        governs = group if self.by_tensor else "method"
        assert start is not None
        if self.parameter.kind is bool:
            return categorical(name, self.kind, governs, _SWITCH, _SWITCH[int(start)], when)
        integer = self.parameter.kind is int
        return Gene(name, self.kind, governs, low, high, start, self.bounds.step, integer=integer, when=when)


def own_parameters(config: ParameterSpaceConfig, methods: Sequence[Method]) -> list[OwnParameter]:
    """The methods' own parameters that are searched or fixed.

    config: the `space` block of a search file.
    methods: the methods that candidates may use.
    Raises InputError for unknown names and wrong bounds.
    """
    _check_names(config, methods)
    parameters = []
    for method in methods:
        named = config.parameters.get(method.plain, {})
        for parameter in method.own:
            change, where = named.get(parameter.name), f"space.parameters.{method.plain}.{parameter.name}"
            if parameter is OMEGA and config.post.aim is not None:
                change, where = config.post.aim.omega, "space.post.aim.omega"
            if change is not None or not method.takes("weight"):
                parameters.append(OwnParameter(method, parameter, _bounds(parameter, change or GeneChange(), where)))
    return parameters


def _check_names(config: ParameterSpaceConfig, methods: Sequence[Method]) -> None:
    used = {method.plain: method for method in methods}
    for name, named in config.parameters.items():
        if name not in used:
            raise InputError(f"space.parameters.{name} is for no method in space.method; {choices(name, used)}.")
        own = [parameter.name for parameter in used[name].own if parameter is not OMEGA]
        for parameter in named:
            if parameter not in own:
                raise InputError(f"space.parameters.{name}.{parameter} cannot be searched; {choices(parameter, own)}.")


def _bounds(parameter: Parameter, change: GeneChange, where: str) -> GeneConfig:
    """The table's range with a user's changes. A start that the user does not give is moved inside the bounds."""
    table = parameter.search
    assert table is not None
    given = change.model_dump(exclude_none=True)
    low, high = given.get("low", table.low), given.get("high", table.high)
    start = min(max(table.start, low), high)
    bounds = {"low": low, "high": high, "start": start, "step": table.step, **given}
    checked = validate(GeneConfig, bounds, where)
    if parameter.kind is bool and given.keys() & {"low", "high", "step"}:
        raise InputError(f"{where} is a switch without bounds; give start or fixed (0 or 1), or nothing.")
    for key, value in bounds.items():
        if parameter.kind is not float and key != "step" and value != int(value):
            raise InputError(f"{where}.{key} is {value:g}; use a whole number.")
        if parameter.kind is bool and value not in (0, 1):
            raise InputError(f"{where}.{key} is {value:g}; use 0 (false) or 1 (true).")
        least, most = parameter.within if parameter.within is not None and key != "step" else (0.0, math.inf)
        if not least <= value <= most:
            expected = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise InputError(f"{where}.{key} is {value:g}; use a number {expected}.")
    return checked
