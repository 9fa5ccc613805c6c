"""The table of search spaces: what each kind can search, its options and its source, as `evomerge spaces` lists them.

To add a space's row: name its settings, its genes and where it comes from, and add it to `SPACES`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel

from evomerge.config import DataFlowConfig, HybridConfig, SpaceConfig
from evomerge.merging.methods import METHODS
from evomerge.merging.methods.base import Method

Row = dict[str, Any]
Domain = Literal["continuous", "integer", "categorical"]


@dataclass(frozen=True, slots=True)
class GeneRow:
    """A kind of gene. `per` says how many there are, `where` which setting frees, fixes or bounds it; `searched` is
    false for one that is searched on request only. No `start` means that it depends on the models."""

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
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class SpaceRow:
    """A row of the table. `settings` is the model behind the file's `space:` block, `genes` makes the list of them."""

    kind: str
    description: str
    paper: str
    settings: type[BaseModel]
    genes: Callable[[], list[GeneRow]]

    def row(self) -> Row:
        options = {
            field.alias or name: field.get_default(call_default_factory=True)
            for name, field in self.settings.model_fields.items()
        }
        return {
            "kind": self.kind,
            "description": self.description,
            "options": {
                name: value.model_dump(exclude_none=True) if isinstance(value, BaseModel) else value
                for name, value in options.items()
            },
            "genes": [gene.row() for gene in self.genes()],
            "paper": self.paper,
        }


def searchable(method: Method) -> list[GeneRow]:
    """What can be searched of a method: what it shares with others first, then its own."""
    both = "group of tensors and model"
    usual = SpaceConfig()
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


def _of_parameter_space() -> list[GeneRow]:
    found = {row.kind: row for method in METHODS.values() for row in searchable(method)}
    return [
        GeneRow("method", "categorical", "merge", "space.method, a list", False, choices="the methods listed"),
        GeneRow(
            "from", "categorical", "merge", "space.method, one between two models", True, choices="base, the models"
        ),
        GeneRow("to", "categorical", "merge", "space.method, one between two models", True, choices="the models"),
        GeneRow("take", "categorical", "model", "space.participate", False, choices="out, in"),
        *found.values(),
    ]


def _of_paths() -> list[GeneRow]:
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


def _of_both() -> list[GeneRow]:
    hop = GeneRow("hop", "categorical", "place in the path", "space.path", True, choices="nothing, the blocks")
    return [replace(row, where=row.where.replace("space.", "space.parameter.")) for row in _of_parameter_space()] + [
        hop
    ]


SPACES: dict[str, SpaceRow] = {
    space.kind: space
    for space in (
        SpaceRow(
            kind="parameter",
            description="the numbers of merge methods, which method, and which models",
            paper="Akiba et al. 2025, Evolutionary optimization of model merging recipes, section 3.1, "
            "arXiv:2403.13187",
            settings=SpaceConfig,
            genes=_of_parameter_space,
        ),
        SpaceRow(
            kind="data_flow",
            description="which layers of which models, in what order",
            paper="Akiba et al. 2025, section 3.2",
            settings=DataFlowConfig,
            genes=_of_paths,
        ),
        SpaceRow(
            kind="hybrid",
            description="a merge, and a path through its layers and those of its models",
            paper="Akiba et al. 2025, section 3.3",
            settings=HybridConfig,
            genes=_of_both,
        ),
    )
}
