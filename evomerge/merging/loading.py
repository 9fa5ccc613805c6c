"""A model as transformers runs it, from a source that may have an adapter."""

from typing import TYPE_CHECKING, Any

from evomerge.merging.building import load_model
from evomerge.merging.naming import naming_in
from evomerge.merging.sources.references import ModelSource
from evomerge.merging.sources.weights import Weights

if TYPE_CHECKING:
    import torch


def load_source(source: ModelSource, dtype: "torch.dtype") -> Any:
    """The model of a source on the CPU, with its adapter merged into it as a merge would read it.

    source: the model's folder, and that of an adapter.
    dtype: that of its weights in memory.
    Raises InputError for a folder that cannot be loaded.
    """
    model = load_model(source.folder, dtype)
    if source.adapter is not None:
        weights, own = Weights(source), dict(model.named_parameters())
        for name, held in naming_in(source.folder).whole.items():
            if held in own:
                own[held].data.copy_(weights.read(name))
    return model
