"""Settings: what a config says of the model besides the shapes of its tensors.

Under other settings the same weights compute another function, so merging models that differ in them is a mistake, or
at least worth a word.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from evomerge.errors import InputError

_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim", "n_head")
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
_SHIFTING = (
    "rope_parameters",
    "rope_local_base_freq",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "tie_word_embeddings",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "no_rope_layers",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "logit_scale",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "use_parallel_residual",
    "clip_qkv",
    "num_experts_per_tok",
    "norm_topk_prob",
)
_LONGEST = 60  # characters of a value in a message


def check_settings(label: str, config: Mapping[str, Any], base: str, base_config: Mapping[str, Any]) -> str | None:
    """A warning about a model whose config differs from the base's, or None where they say the same.

    Raises InputError where tensors of one shape mean different things: under other numbers of heads, or another
    activation. There a key that only one config has is no difference; elsewhere the architecture's default stands in.
    """
    for key in (*_HEADS, *_ACTIVATIONS):
        mine, theirs = config.get(key), base_config.get(key)
        if mine is not None and theirs is not None and mine != theirs:
            raise InputError(
                f"{label}: {key} in config.json is {mine}, but the base ({base}) has {theirs}; only fine-tunes of one "
                "base can be merged."
            )
    mine, theirs = _shifting(config), _shifting(base_config)
    different = [
        f"{key} is {_shown(mine.get(key))}, the base's {_shown(theirs.get(key))}"
        for key in dict.fromkeys([*theirs, *mine])
        if mine.get(key) != theirs.get(key)
    ]
    if not different:
        return None
    return (
        f"{label}: its config.json differs from that of the base ({base}), whose values every merge has: "
        f"{'; '.join(different)}."
    )


def _shifting(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that shift what a model computes, with defaults, in the names that transformers has for them now."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config["model_type"]
    try:
        known = CONFIG_MAPPING[kind].from_dict(dict(config)).get_text_config().to_dict()
    except Exception:  # a config is checked by several libraries, and told of where the model is built
        known = dict(config)
    return dict(_flat("", {key: known.get(key) for key in _SHIFTING}))


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = key.removeprefix("rope_parameters") if not prefix else f"{prefix}.{key}"
        if isinstance(value, Mapping):
            yield from _flat(name, value)
        elif value is not None and key != "type":  # what rope_type was called once
            yield name.removeprefix("."), value


def _shown(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
