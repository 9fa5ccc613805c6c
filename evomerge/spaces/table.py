"""What every kind of search space can search, as `evomerge spaces` lists it."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel

from evomerge.config.spaces import DataFlowConfig, ParameterSpaceConfig
from evomerge.config.tables import SpaceRow, imported
from evomerge.merging.methods import METHODS, OMEGA
from evomerge.merging.methods.base import Method

Row = dict[str, Any]
Domain = Literal["continuous", "integer", "categorical"]


@dataclass(frozen=True, slots=True)
class GeneRow:
    """A kind of gene.

    kind: its name, such as `weight`.
    domain: what values it can have.
    per: what there is one gene for, such as `model`.
    where: the setting that frees, fixes or bounds it.
    searched: whether it is searched without being asked for.
    choices: what a categorical gene chooses from, in words.
    low: its least value.
    high: its largest value.
    start: where a search starts; None where that depends on the models.
    step: the first step of a search.
    """

    kind: str
    domain: Domain
    per: str
    where: str
    searched: bool
    choices: str | None = None
    low: float | None = None
    high: float | None = None
    start: float | None = None
    step: float | None = None

    def row(self) -> Row:
        """The fields that have a value, by name, for JSON and tables."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def space_row(kind: str, space: SpaceRow) -> Row:
    """A kind of search space with its options and genes, for JSON and tables.

    kind: its name.
    space: its row in the table of spaces.
    """
    options = {
        field.alias or name: field.get_default(call_default_factory=True)
        for name, field in space.settings.model_fields.items()
    }
    genes: list[GeneRow] = imported(space.genes)()
    return {
        "kind": kind,
        "description": space.description,
        "options": {
            name: value.model_dump(exclude_none=True) if isinstance(value, BaseModel) else value
            for name, value in options.items()
        },
        "genes": [gene.row() for gene in genes],
        "paper": space.paper,
    }


def searchable(method: Method) -> list[GeneRow]:
    """The kinds of genes of a method: first those that it has in common with others, then its own."""
    both = "group of tensors and model"
    usual = ParameterSpaceConfig()
    rows = [
        GeneRow(
            kind,
            "continuous",
            per,
            f"space.{kind}",
            searched=gene.fixed is None,
            **gene.model_dump(include={"low", "high", "start", "step"}),
        )
        for kind, per, gene, has in (
            ("weight", both, usual.weight, method.takes("weight")),
            ("density", both, usual.density, method.takes("density")),
            ("lambda", "merge", usual.lambda_, method.shares("lambda")),
        )
        if has
    ]
    for parameter in method.own:
        table = parameter.search
        assert table is not None
        per = "merge" if parameter.kind is not float else both if method.takes(parameter.name) else "group of tensors"
        domain: Domain = (
            "integer" if parameter.kind is int else "categorical" if parameter.kind is bool else "continuous"
        )
        rows.append(
            GeneRow(
                kind=f"{method.name}.{parameter.name}",
                domain=domain,
                per=per,
                where=f"space.parameters.{method.name}.{parameter.name}",
                searched=not method.takes("weight"),
                **({"choices": "false, true"} if domain == "categorical" else asdict(table)),
            )
        )
    return rows


def of_parameter_space() -> list[GeneRow]:
    """The kinds of genes of the parameter space."""
    assert OMEGA.search is not None
    by_kind = {row.kind: row for method in METHODS.values() for row in searchable(method)}
    return [
        GeneRow("method", "categorical", "merge", "space.method, a list", False, choices="the methods listed"),
        GeneRow(
            "from", "categorical", "merge", "space.method, one between two models", True, choices="base, the models"
        ),
        GeneRow("to", "categorical", "merge", "space.method, one between two models", True, choices="the models"),
        GeneRow(
            "pair",
            "categorical",
            "merge",
            "space.method, one of two models",
            True,
            choices="pairs of models",
        ),
        GeneRow("take", "categorical", "model", "space.participate", False, choices="out, in"),
        *by_kind.values(),
        GeneRow("METHOD.omega", "continuous", "group of tensors", "space.post.aim", False, **asdict(OMEGA.search)),
    ]


def of_paths() -> list[GeneRow]:
    """The kinds of genes of the data-flow space."""
    scale = DataFlowConfig(kind="data_flow").scale.model_dump(include={"low", "high", "start", "step"})
    return [
        GeneRow("hop", "categorical", "place in the path", "space.form path", True, choices="nothing, the blocks"),
        GeneRow("gate", "categorical", "slot", "space.form slots", True, choices="closed, open"),
        GeneRow("scale", "continuous", "hop or open slot", "space.scale", False, **scale),
        GeneRow("model", "categorical", "part of a path", "the other forms", True, choices="the sources"),
        GeneRow("layers", "integer", "number of a family", "the other forms", True, choices="as many as fit"),
        GeneRow("place", "continuous", "block", "space.form reorder", True, low=0.0, high=1.0),
        GeneRow("mode", "categorical", "graft", "space.form graft", True, choices="replace, insert"),
        GeneRow("donor", "categorical", "path", "space.embeddings, space.head", False, choices="the sources"),
    ]


def of_both() -> list[GeneRow]:
    """The kinds of genes of the hybrid space."""
    hop = GeneRow("hop", "categorical", "place in the path", "space.path", True, choices="nothing, the blocks")
    return [replace(row, where=row.where.replace("space.", "space.parameter.")) for row in of_parameter_space()] + [hop]
