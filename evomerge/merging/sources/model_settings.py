"""Settings: what a config says of the model besides the shapes of its tensors.

With other settings the same weights compute another function. So merging models that differ in a setting is a mistake,
or at least deserves a warning.
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
    """A warning about a model whose config differs from the base's; None where the two say the same.

    Numbers of heads and activations are compared where both configs have them. For other settings, the architecture's
    default counts where a config has no value.

    label: what to call the model in a message.
    config: the model's config.json.
    base: what to call the base in a message.
    base_config: the base's config.json.
    Raises InputError where tensors of one shape mean different things: with another number of heads or activation.
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
    """The settings that shift what a model computes, with defaults, by the present names in transformers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config["model_type"]
    try:
        settings = CONFIG_MAPPING[kind].from_dict(dict(config)).get_text_config().to_dict()
    except Exception:  # several libraries check a config; their errors are reported where the model is built
        settings = dict(config)
    return dict(_flat("", {key: settings.get(key) for key in _SHIFTING}))


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = key.removeprefix("rope_parameters") if not prefix else f"{prefix}.{key}"
        if isinstance(value, Mapping):
            yield from _flat(name, value)
        elif value is not None and key != "type":  # the old name of rope_type
            yield name.removeprefix("."), value


def _shown(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
