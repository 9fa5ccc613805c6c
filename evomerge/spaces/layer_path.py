"""LayerPath: which layer of which model, in what order, how loud; and its recipe.

A path is a recipe of mergekit's `passthrough`: slices of layers in any order, each with a filtered `scale`, so that a
path candidate is a plain checkpoint. Scales therefore fold into weights, by rules that depend on where an architecture
puts its norms (Akiba et al. 2025, section 3.2, scale the input of a hop; see `Scaling`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from evomerge.errors import InputError
from evomerge.recipe import FilteredValue, Recipe, Slice, Source

Scaling = Literal["mlp", "stream"]
"""What a hop's scale multiplies: `mlp` the output of its MLP (as in the models that Sakana released, where the scale
belongs to the next hop), exactly; `stream` everything that enters the hop, exactly but for the norms' epsilon."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One layer of the output: layer number `layer` of a model, counted from 0."""

    model: str
    layer: int
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class LayerPath:
    """Hops in order, and the models that give the embeddings and the final norm with the head."""

    hops: tuple[Hop, ...]
    embeddings: str
    head: str
    scaling: Scaling = "mlp"

    def recipe(self, model_type: str, base: str) -> Recipe:
        """The path as mergekit reads it; config and tokenizer are those of `base`.

        Raises InputError where the architecture has no weights that a scale could be folded into.
        """
        runs = _runs(self.hops, folded_scales(self, model_type))
        slices = [_slice(hop.model, hop.layer, count, scale) for hop, scale, count in runs]
        before = [_slice(self.embeddings, 0, 0, {})] if self.hops[0].model != self.embeddings else []
        after = [_slice(self.head, 0, 0, {})] if self.hops[-1].model != self.head else []
        return Recipe(merge_method="passthrough", base_model=base, slices=(*before, *slices, *after))


def _runs(hops: Sequence[Hop], scales: Sequence[Mapping[str, float]]) -> Iterator[tuple[Hop, Mapping[str, float], int]]:
    """First hop, folded scales and length of every run of layers that stand in their model's own order."""

    def key(place: int) -> tuple[str, int, list[tuple[str, float]]]:
        return hops[place].model, hops[place].layer - place, sorted(scales[place].items())

    for _, members in groupby(range(len(hops)), key):
        run = list(members)
        yield hops[run[0]], scales[run[0]], len(run)


def _slice(model: str, first: int, count: int, scales: Mapping[str, float]) -> Slice:
    """An empty slice gives no layers, only the embeddings (in front) or the final norm and head (at the end)."""
    conditions = [FilteredValue(filter=name, value=value) for name, value in scales.items()]
    source = Source(
        model=model,
        layer_range=(first, first + count),
        parameters={"scale": [*conditions, FilteredValue(value=1.0)]} if conditions else {},
    )
    return Slice(sources=(source,))


@dataclass(frozen=True, slots=True)
class ScaleRule:
    """Parts of tensor names of one layer: those whose output is the MLP's, those whose output is added to the stream,
    and those that read it without a norm in between."""

    mlp: str | None
    writes: tuple[str, ...]
    reads: tuple[str, ...] = ()


_PRE_NORM = ScaleRule(mlp="mlp.down_proj", writes=("self_attn.o_proj", "mlp.down_proj"))
_GEMMA = ScaleRule(mlp=None, writes=())
SCALE_RULES: dict[str, ScaleRule] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3"), _PRE_NORM),
    "gpt2": ScaleRule(mlp="mlp.c_proj", writes=("attn.c_proj", "mlp.c_proj")),
    "gpt_neox": ScaleRule(mlp="mlp.dense_4h_to_h", writes=("attention.dense", "mlp.dense_4h_to_h")),
    # a norm follows the attention and the MLP, and nothing but projections reads the stream
    "olmo2": ScaleRule(
        mlp="post_feedforward_layernorm",
        writes=("post_attention_layernorm", "post_feedforward_layernorm"),
        reads=("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
    ),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
}


def check_scaling(model_type: str, where: str = "scale") -> None:
    """Raises InputError where a scale cannot be folded into an architecture's weights."""
    rule = SCALE_RULES.get(model_type)
    if rule is None:
        raise InputError(
            f"{where}: how scales fold into the weights of a {model_type} model is not known (it is for "
            f"{', '.join(name for name, known in SCALE_RULES.items() if known.mlp)}); fix the scale at 1."
        )
    if rule.mlp is None:
        raise InputError(
            f"{where}: a {model_type} model cannot take scales, since the norms behind its attention and MLP undo them "
            "and multiply by 1 + weight, which no recipe's `scale` can express; fix the scale at 1."
        )


def folded_scales(path: LayerPath, model_type: str) -> list[dict[str, float]]:
    """For every hop, the parts of tensor names that are multiplied, with their factors (none that are 1).

    mlp: the MLP's last weights by the hop's scale. stream: scaling the stream before each of the hops by w_1 ... w_k
    is the same as dividing what hop k adds by c_k = w_1 * ... * w_k, up to a factor c_n that the final norm takes out;
    weights that read the stream past a norm are multiplied by c_k.
    """
    if all(hop.scale == 1.0 for hop in path.hops):
        return [{} for _ in path.hops]
    check_scaling(model_type)
    rule, found, product = SCALE_RULES[model_type], [], 1.0
    for hop in path.hops:
        product *= hop.scale
        if path.scaling == "mlp":
            factors = {str(rule.mlp): hop.scale}
        else:
            factors = dict.fromkeys(rule.writes, 1.0 / product) | dict.fromkeys(rule.reads, product)
        found.append({name: factor for name, factor in factors.items() if factor != 1.0})
    return found
