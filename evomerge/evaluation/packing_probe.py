"""Tries on a tiny model whether an architecture takes packed rows."""

import contextlib
from pathlib import Path
from typing import Any

import torch

from evomerge.evaluation.packing import VOCABULARY, Tokens
from evomerge.quiet import quiet


def takes_packed_rows(folder: Path) -> bool:
    """Whether the architecture in a model's folder gives packed rows the same scores as full rows.

    It is tried on a tiny model with random weights, so that the answer depends only on the model's config and on the
    versions of the libraries.
    """
    from evomerge.evaluation.likelihoods import PreparedRequests, Request

    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> Tokens:
        return tuple(torch.randint(3, VOCABULARY, (count,), generator=draw).tolist())

    requests = [
        Request(prefix, tokens(count), document)
        for document, prefix in enumerate((tokens(21), tokens(9)))
        for count in (1, 4, 2, 3)
    ]
    try:
        with quiet():
            model = _tiny_model(folder)
            device = torch.device("cpu")
            packed = PreparedRequests(requests, 8, 32, device, packed=True).run(model)
            alone = PreparedRequests(requests, 8, 32, device).run(model)
    except Exception:  # architectures refuse the mask, or such small sizes, with all kinds of exceptions
        return False
    return all(
        abs(mine.log_likelihood - other.log_likelihood) < 1e-3 for mine, other in zip(packed, alone, strict=True)
    )


_TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "sliding_window": 5,
    "attention_chunk_size": 5,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}


def _tiny_model(folder: Path) -> Any:
    """A random model of a folder's architecture: one layer of every kind, small in every direction."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    for key, value in _TINY.items():
        if getattr(config, key, None) is not None:
            with contextlib.suppress(AttributeError):  # some settings are computed from others
                setattr(config, key, value)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        config.layer_types = list(dict.fromkeys(kinds))
    config.num_hidden_layers = len(config.layer_types) if kinds is not None else 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    return model.eval()
