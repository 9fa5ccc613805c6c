"""One recipe or two of every method, and every way of making their merges, none of which may change a bit.

`resident/test_ways.py` claims it of the CPU, and `pretended/claims.py` of accelerators.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.errors import CandidateFailed
from evomerge.layers import layer_index
from evomerge.merging.methods import METHODS, passes
from evomerge.merging.methods.base import JOINT
from evomerge.merging.methods.kernels import checksum, fingerprint_of
from evomerge.merging.resident import models as resident
from evomerge.merging.resident.models import ResidentModels
from evomerge.merging.resident.sources import Form, Kept, Where
from evomerge.merging.sources.models import Models
from evomerge.merging.sources.references import ModelSource
from evomerge.merging.sources.statistics import NOTES, WORDS, Shelf
from evomerge.merging.sources.weights import WEIGHTS
from evomerge.recipe import Recipe
from tests.merging.methods.measured import statistics
from tests.merging.resident.test_models import recipe
from tests.models import models, write_adapter

RECIPES: dict[str, list[Recipe]] = {
    **{
        name: [recipe(name, rescale=rescale) for rescale in (("l1", "density") if row.random else ("l1",))]
        for name, row in METHODS.items()
    },
    "dare_ties+aim": [recipe("dare_ties+aim")],
    **{name: [recipe(name)] for name in ("dare_ties+rows", "breadcrumbs+rows+aim", "wudi+rows")},
}

ALIKE = (  # each has the steps of another method
    "task_arithmetic",
    "dare_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
    "della_linear",
    "multislerp",
    "ramplus_tl",
    "gradient_matching",
    "regmean_plus",
)
FEW = ("linear", "dare_ties", "passthrough")  # without fields, with them, and without a pass


@dataclass(frozen=True)
class Way:
    """How a merge is made: what `ResidentModels` is told beside the models and their dtype."""

    device: str = "cpu"
    count: int = 1
    compiled: bool = False
    sources: Where = "device"
    fields: Kept = "kept"
    adapters: Form = "expanded"


def _placed(**given: Any) -> Iterator[Way]:
    for sources, fields, form in product(("device", "host", "disk"), ("kept", "made"), ("expanded", "factors")):
        yield Way(**given, sources=sources, fields=fields, adapters=form)


# each with the plainest way first
EAGER = list(_placed())
IN_PAIRS = [  # every pair of choices at least once
    Way(),
    Way(fields="made", adapters="factors"),
    Way(sources="host", adapters="factors"),
    Way(sources="host", fields="made"),
    Way(sources="disk", fields="made", adapters="factors"),
    Way(sources="disk"),
]
COMPILED = [
    Way(),
    Way(compiled=True),
    Way(compiled=True, sources="host", adapters="factors"),
    Way(compiled=True, sources="disk", fields="made"),
]
ON_ONE = [Way(), Way("pretend", adapters="factors"), Way("pretend", sources="host", fields="made")]
ON_TWO = [Way(), Way("pretend", count=2, sources="disk", fields="made", adapters="factors")]
Load: TypeAlias = Callable[[Way, str], ResidentModels]


def loader(tiny_models: Mapping[str, Path], root: Path) -> Load:
    """Loads a base, adapters of another model and of the base, and a model without one: in a way and a dtype, once.

    root: an empty folder for what they need.
    """
    base = tiny_models["base"]
    other = Path(shutil.copytree(tiny_models["first"], root / "other"))
    narrow = {name: tensor.bfloat16() for name, tensor in load_file(other / WEIGHTS).items()}
    save_file(narrow, other / WEIGHTS, {"format": "pt"})
    first = write_adapter(root / "first", other, 1, norm=True, rank=7, dtype=torch.float16)
    second = write_adapter(root / "second", base, 2, dtype=torch.float32, use_rslora=True, alpha_pattern={"q_proj": 7})
    family = {
        "base": ModelSource(base),
        "first": ModelSource(other, first),
        "second": ModelSource(base, second),
        "third": ModelSource(tiny_models["third"]),
    }
    write_statistics(models(family, base), root)

    @cache
    def load(way: Way, dtype: str) -> ResidentModels:
        found = models(family, base)
        return ResidentModels(found, dtype=dtype, statistics=Shelf([root]).finder(found), **asdict(way))

    return load


def write_statistics(found: Models, root: Path) -> None:
    """Random statistics of every kind of each model."""
    for kind, (index, model) in product(WORDS, enumerate(found.values())):
        prefix = "0:" if kind in JOINT else ""
        measured = {
            prefix + name: statistics(model.weights.read(name), in_layer=layer_index(name) is not None)(kind, index)
            for name in model.weights.table
        }
        tensors = {name: each.values for name, each in measured.items() if each is not None}
        digest = fingerprint_of(int(checksum(tensor, name)) for name, tensor in tensors.items())
        folder = root / f"{kind}-{index:016x}-{digest}"
        folder.mkdir()
        save_file(tensors, folder / WEIGHTS)
        notes: dict[str, Any] = {"kind": kind, "models": [model.identity], "mean": 1e-7 * (index + 2)}
        notes["measured"] = {"base": found.base.identity} if kind in JOINT else {}
        (folder / NOTES).write_text(json.dumps(notes))


def outcomes(method: str, dtype: str, ways: Iterable[Way], load: Load) -> dict[Way, tuple[str, ...]]:
    """What each way makes of a method's recipes (see `outcome`).

    Tensors as small as these come in pieces all the same, are compiled, and keep no table where fields are made again.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "STAGED", 1 << 10)
        patch.setattr(passes, "_COMPILED_FROM", 1)
        patch.setattr(resident, "_SMALL", 0)
        return {way: tuple(outcome(load(way, dtype), merge) for merge in RECIPES[method]) for way in ways}


def outcome(loaded: ResidentModels, merge: Recipe) -> str:
    """The fingerprint of a merge, or why there is none: `ace` passes float16's range where a model is the base."""
    try:
        return loaded.materialize(merge)
    except CandidateFailed as error:
        assert merge.merge_method == "ace"
        return str(error)
