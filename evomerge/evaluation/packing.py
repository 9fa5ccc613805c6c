"""Options of one document in one row, behind the prefix that they share, which is then computed once.

A packed row is the prefix followed by what is left of each option. Every token keeps the position that it would have
alone, and a mask lets it see the prefix and its own option only, so that the model computes what it computes on rows of
their own, up to rounding. Architectures whose attention takes such a mask are found by trying a tiny model of each.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evomerge.quiet import quiet

Tokens = tuple[int, ...]
PREFIX, PADDING = 0, -1
LONGEST = 4
VOCABULARY = 64  # of the tiny models that are tried


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Rows of tokens in one: the first `prefix` tokens, which they share, and behind them what is left of each."""

    rows: tuple[Tokens, ...]
    prefix: int

    @property
    def tokens(self) -> Tokens:
        return self.rows[0][: self.prefix] + tuple(token for row in self.rows for token in row[self.prefix :])

    @property
    def positions(self) -> list[int]:
        return [*range(self.prefix), *(place for row in self.rows for place in range(self.prefix, len(row)))]

    @property
    def segments(self) -> list[int]:
        """0 in the prefix, 1, 2, ... in the branches."""
        branches = (number for number, row in enumerate(self.rows, 1) for _ in row[self.prefix :])
        return [PREFIX] * self.prefix + list(branches)

    def offsets(self) -> list[int]:
        """For each row, how much further right its branch stands in the packed row than alone."""
        offsets, end = [], 0
        for row in self.rows:
            offsets.append(end)
            end += len(row) - self.prefix
        return offsets


def pack(rows: Sequence[Tokens]) -> Iterator[PackedRow]:
    """A document's distinct rows, those together that have more than half of their tokens in common.

    No row gets longer than a few of those in it, since attention costs the square.
    """
    together: list[Tokens] = []
    shared = 0
    for row in sorted(rows):
        common = _common(together[0][:shared], row) if together else 0
        longest = max(len(other) for other in (*together, row))
        packed = common + sum(len(other) - common for other in (*together, row))
        if together and 2 * common > longest and packed <= LONGEST * longest:
            together.append(row)
            shared = common
            continue
        if together:
            yield PackedRow(tuple(together), shared)
        together, shared = [row], len(row)
    if together:
        yield PackedRow(tuple(together), shared)


def _common(one: Tokens, other: Tokens) -> int:
    """How many tokens two rows share at their beginning."""
    for place, (first, second) in enumerate(zip(one, other, strict=False)):
        if first != second:
            return place
    return min(len(one), len(other))


def attention(config: Any, segments: torch.Tensor, positions: torch.Tensor) -> Any:
    """What a model takes as its attention mask for packed rows: a tensor (rows, 1, length, length), or one per kind of
    layer where some see only a window. Boolean, or for plain attention, which adds its mask, numbers.

    segments and positions: (rows, length).
    """
    length = segments.shape[1]
    order = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    keys, queries = segments[:, None, :], segments[:, :, None]
    whole = (((keys == PREFIX) | (keys == queries)) & order)[:, None]
    window = getattr(config, "sliding_window", None)
    if window is None:
        return _added(config, whole)
    near = whole & (positions[:, None, :, None] - positions[:, None, None, :] < window)
    whole, near = _added(config, whole), _added(config, near)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # every layer has the window
        return near
    if "sliding_attention" not in kinds:
        return whole
    return {"full_attention": whole, "sliding_attention": near}


def _added(config: Any, mask: torch.Tensor) -> torch.Tensor:
    """The mask as numbers to be added, where the model's attention is the plain one."""
    if config._attn_implementation != "eager":
        return mask
    dtype = config.dtype or torch.float32
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def takes_packed_rows(folder: Path) -> bool:
    """Whether the architecture in a model's folder scores packed rows as it scores full ones.

    Found out on a tiny model with random weights, so that the answer depends on the model's config and on the versions
    of the libraries alone.
    """
    from evomerge.evaluation.prepared import PreparedRequests, Request

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
    except Exception:  # an architecture that takes no such mask or cannot be made this small says so in its own way
        return False
    return all(abs(one.log_likelihood - two.log_likelihood) < 1e-3 for one, two in zip(packed, alone, strict=True))


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
            with contextlib.suppress(AttributeError):  # some are worked out from the others
                setattr(config, key, value)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        config.layer_types = list(dict.fromkeys(kinds))
    config.num_hidden_layers = len(config.layer_types) if kinds is not None else 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    return model.eval()
