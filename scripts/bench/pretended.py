"""A search without models, for measuring all that is around them: what `chaos` and `driver` run."""

import hashlib
from typing import Any

from evomerge.candidate import Evaluation
from evomerge.config.base import Split
from evomerge.config.search import SearchConfig
from evomerge.config.spaces import ParameterSpaceConfig
from evomerge.optimizers.make import resolve
from evomerge.recipe import Recipe
from evomerge.spaces.parameter import ParameterSpace

LAYERS = 24
PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def pretended_search(seed: int, optimizer: dict[str, Any], **workers: Any) -> tuple[SearchConfig, ParameterSpace]:
    """Two fine-tunes of a model of 24 layers in six groups, two objectives, CMA-ES."""
    tensors = [f"model.layers.{layer}.{part}.weight" for layer in range(LAYERS) for part in PARTS]
    config = SearchConfig.model_validate(
        {
            "base": "base",
            "models": {"math": "math", "lang": "lang"},
            "objectives": [{"task": "one", "goal": "maximize"}, {"task": "two", "goal": "maximize"}],
            "space": {"layer_granularity": 4},
            "optimizer": optimizer,
            "workers": workers,
            "seed": seed,
        }
    )
    tensors += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert isinstance(config.space, ParameterSpaceConfig)
    space = ParameterSpace(config.space, config.base, config.models, tensors, seed)
    resolved = resolve(config.optimizer, len(space.genes), len(config.objectives))
    return config.model_copy(update={"optimizer": resolved}), space


def pretended_evaluation(recipe: Recipe, split: Split) -> Evaluation:
    """Scores drawn from the recipe's hash."""
    digest = hashlib.sha256(f"{recipe.content_id()} {split}".encode()).digest()
    scores = {"one": digest[0] / 255, "two": digest[1] / 255}
    return Evaluation(scores=scores, items=1, fingerprint=recipe.content_id())
