"""Block influence: how much each layer changes what passes through it (Men et al. 2024, arXiv:2403.03853)."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.layers import is_layer, layer_index
from evomerge.merging.loading import load_source
from evomerge.merging.sources.references import ModelSource
from evomerge.merging.sources.tokenizers import read_tokenizer, token_ids


@dataclass(frozen=True, slots=True)
class LayerSimilarity:
    """What a model's layers do to texts.

    similarity: for each layer, the mean cosine of its input and its output over all tokens; 1 where it does nothing.
    tokens: how many tokens were read.
    """

    similarity: tuple[float, ...]
    tokens: int


def layer_similarity(source: ModelSource, texts: Sequence[str], device: str) -> LayerSimilarity:
    """The similarity of the layers' inputs and outputs.

    source: the model's folder, and that of an adapter.
    texts: what the model reads, one at a time, so that the figures do not depend on a batch.
    device: where it runs: in float32 on a CPU, and in bfloat16 elsewhere.
    """
    import torch

    tokenizer = read_tokenizer(source.folder)
    model = load_source(source, torch.float32 if device == "cpu" else torch.bfloat16).to(device)
    watched = _Watched(model)
    tokens = 0
    with torch.no_grad():
        for text in texts:
            ids = token_ids(tokenizer, text)
            if ids.numel():
                model(input_ids=ids.to(device), use_cache=False)
                tokens += ids.numel()
    return LayerSimilarity(tuple(watched.sums[layer] / tokens for layer in sorted(watched.sums)), tokens)


class _Watched:
    """A model whose layers are watched.

    sums: by layer, the sum of the cosines of all tokens' states before and after it.
    """

    def __init__(self, model: Any) -> None:
        """model: a transformers model."""
        self.sums: dict[int, float] = defaultdict(float)
        for name, module in model.named_modules():
            if is_layer(name):
                module.register_forward_hook(self._hook(layer_index(f"{name}.weight") or 0), with_kwargs=True)

    def _hook(self, layer: int) -> Callable[..., None]:
        def add(module: Any, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            from torch.nn.functional import cosine_similarity

            before = given[0] if given else named["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosines = cosine_similarity(before.double().cpu(), after.double().cpu(), dim=-1)
            self.sums[layer] += float(cosines.sum())

        return add
