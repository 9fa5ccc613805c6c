"""LayerPath: which layer of which model, in what order and with what scale; and the recipe of a path.

The recipe is one of mergekit's `passthrough`: slices of layers in any order, each with a filtered `scale`. So a path
candidate is a plain checkpoint, and scales have to fold into weights. Only layers that run side by side have no
checkpoint; they are named in the recipe's `evomerge:` block. How scales fold depends on where an architecture
puts its norms. (Akiba et al. 2025, section 3.2, scale the input of a hop; see `Scaling`.)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from evomerge.errors import InputError
from evomerge.recipe import Blocks, FilteredValue, Provenance, Recipe, Slice, Source

Scaling = Literal["mlp", "stream"]
"""What a hop's scale multiplies.

mlp: the output of its MLP, exactly; as in the models that Sakana released, where the scale belongs to the next hop.
stream: everything that enters the hop, exactly but for the norms' epsilon.
"""


@dataclass(frozen=True, slots=True)
class Hop:
    """One layer of the output.

    model: the model that it comes from.
    layer: its number there, counted from 0.
    scale: what `Scaling` multiplies by.
    block: the number of the block whose layers run side by side; None where the layer runs alone.
    """

    model: str
    layer: int
    scale: float = 1.0
    block: int | None = None


@dataclass(frozen=True, slots=True)
class LayerPath:
    """The layers of a model, and where its other tensors come from.

    hops: the layers, in order.
    embeddings: the model that gives the embeddings.
    head: the model that gives the final norm and the head.
    scaling: what the scales of the hops multiply.
    """

    hops: tuple[Hop, ...]
    embeddings: str
    head: str
    scaling: Scaling = "mlp"

    def recipe(self, model_type: str, base: str) -> Recipe:
        """The recipe of the path, which mergekit reads.

        model_type: the type of the models, such as `llama`.
        base: the reference of the model whose config and tokenizer the output has.
        Raises InputError where the architecture has no weights that a scale could be folded into.
        """
        runs = _runs(self.hops, folded_scales(self, model_type))
        slices = [_slice(hop.model, hop.layer, count, scale) for hop, scale, count in runs]
        before = [_slice(self.embeddings, 0, 0, {})] if self.hops[0].model != self.embeddings else []
        after = [_slice(self.head, 0, 0, {})] if self.hops[-1].model != self.head else []
        whole = Recipe(merge_method="passthrough", base_model=base, slices=(*before, *slices, *after))
        blocks = side_by_side(self.hops)
        return whole.model_copy(update={"evomerge": Provenance(parallel=blocks)}) if blocks else whole


def side_by_side(hops: Sequence[Hop]) -> Blocks:
    """The blocks of hops that run side by side, as in `Provenance`. A hop that is left alone in its block is none."""
    runs = [list(run) for _, run in groupby(range(len(hops)), lambda place: hops[place].block)]
    return tuple((run[0], run[-1] + 1) for run in runs if hops[run[0]].block is not None and len(run) > 1)


def _runs(hops: Sequence[Hop], scales: Sequence[Mapping[str, float]]) -> Iterator[tuple[Hop, Mapping[str, float], int]]:
    """For each run of hops that are in their model's order: the first hop, the folded scales, the number of hops."""

    def key(place: int) -> tuple[str, int, list[tuple[str, float]]]:
        return hops[place].model, hops[place].layer - place, sorted(scales[place].items())

    for _, members in groupby(range(len(hops)), key):
        run = list(members)
        yield hops[run[0]], scales[run[0]], len(run)


def _slice(model: str, first: int, count: int, scales: Mapping[str, float]) -> Slice:
    """A slice of one model's layers. A slice of no layers gives the embeddings where it is the first, or the final norm
    and the head where it is the last."""
    conditions = [FilteredValue(filter=name, value=value) for name, value in scales.items()]
    source = Source(
        model=model,
        layer_range=(first, first + count),
        parameters={"scale": [*conditions, FilteredValue(value=1.0)]} if conditions else {},
    )
    return Slice(sources=(source,))


@dataclass(frozen=True, slots=True)
class ScaleRule:
    """Which tensors of a layer a scale multiplies, as parts of their names.

    mlp: the tensor whose output is the MLP's; None where scales cannot be folded.
    writes: the tensors whose output is added to the stream.
    reads: the tensors that read the stream without a norm in between.
    """

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
    """Raises InputError where a scale cannot be folded into an architecture's weights.

    model_type: the type of the models, such as `llama`.
    where: the key that sets the scale, which opens an error's message.
    """
    rule = SCALE_RULES.get(model_type)
    if rule is None:
        raise InputError(
            f"{where}: how scales fold into the weights of a {model_type} model is not known (it is for "
            f"{', '.join(name for name, other in SCALE_RULES.items() if other.mlp)}); fix the scale at 1."
        )
    if rule.mlp is None:
        raise InputError(
            f"{where}: a {model_type} model cannot take scales, since the norms behind its attention and MLP undo them "
            "and multiply by 1 + weight, which no recipe's `scale` can express; fix the scale at 1."
        )


def folded_scales(path: LayerPath, model_type: str) -> list[dict[str, float]]:
    """For each hop, the factors of its tensors by parts of their names; factors of 1 are left out.

    With scaling `mlp`, the MLP's last weights are multiplied by the hop's scale. With scaling `stream`, the stream is
    multiplied by w_k before hop k. The same comes out where what hop k adds is divided by c_k = w_1 * ... * w_k, but
    for a factor c_n, which the final norm takes out. Weights that read the stream past a norm are multiplied by c_k.

    path: the hops with their scales.
    model_type: the type of the models, such as `llama`.
    Raises InputError where a scale cannot be folded into the architecture's weights.
    """
    if all(hop.scale == 1.0 for hop in path.hops):
        return [{} for _ in path.hops]
    check_scaling(model_type)
    rule, folded, product = SCALE_RULES[model_type], [], 1.0
    for hop in path.hops:
        product *= hop.scale
        if path.scaling == "mlp":
            factors = {str(rule.mlp): hop.scale}
        else:
            factors = dict.fromkeys(rule.writes, 1.0 / product) | dict.fromkeys(rule.reads, product)
        folded.append({name: factor for name, factor in factors.items() if factor != 1.0})
    return folded
