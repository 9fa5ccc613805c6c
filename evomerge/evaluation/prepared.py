"""Log-likelihood requests as frozen batches: tokenized, deduplicated, sorted and padded once, run for every candidate.

Requests that share context + continuation[:-1] (one-token options of one question, say) share a row. The head is
applied only to the columns that are read. Rows are padded on the right, which a causal model does not see. Batches
never change, because batch composition moves logits in the last digits.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """The log-likelihood of `continuation` after `context` (neither empty) is asked for."""

    context: Tokens
    continuation: Tokens


@dataclass(frozen=True, slots=True)
class Response:
    """The sum of the continuation's log-probabilities, and whether greedy decoding would have written it."""

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True, slots=True)
class _Batch:
    """ids (rows, length). For each scored token: its row, column (from `first` on) and target; `owners` are
    requests.
    """

    ids: torch.Tensor
    first: int
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    owners: np.ndarray[Any, np.dtype[np.int64]]


class PreparedRequests:
    """All log-likelihood requests of a split, ready to run."""

    def __init__(self, requests: Sequence[Request], batch_size: int, max_length: int, device: torch.device) -> None:
        """max_length: the model's context; longer requests lose tokens on the left, as in lm-eval."""
        self._count = len(requests)
        rows: dict[Tokens, list[tuple[int, Tokens]]] = {}
        for owner, request in enumerate(requests):
            continuation = request.continuation[-max_length:]
            whole = (*request.context, *continuation)[-(max_length + 1) :]
            rows.setdefault(whole[:-1], []).append((owner, continuation))
        ordered = sorted(rows, key=lambda row: (-len(row), row))
        self._batches = [
            _batch([(row, rows[row]) for row in ordered[start : start + batch_size]], device)
            for start in range(0, len(ordered), batch_size)
        ]

    @torch.inference_mode()
    def run(self, model: torch.nn.Module) -> list[Response]:
        """A response per request, in the order given."""
        likelihoods = np.zeros(self._count)
        misses = np.zeros(self._count)
        for batch in self._batches:
            scores, greedy = _score(model, batch)
            np.add.at(likelihoods, batch.owners, scores)
            np.add.at(misses, batch.owners, ~greedy)
        return [Response(float(value), bool(miss == 0)) for value, miss in zip(likelihoods, misses, strict=True)]


def _batch(rows: Sequence[tuple[Tokens, Sequence[tuple[int, Tokens]]]], device: torch.device) -> _Batch:
    length = max(len(row) for row, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    scored: list[tuple[int, int, int, int]] = []
    for place, (row, continuations) in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        for owner, continuation in continuations:
            start = len(row) - len(continuation)
            scored += [(place, start + offset, token, owner) for offset, token in enumerate(continuation)]
    first = min(column for _, column, _, _ in scored)
    places, columns, targets, owners = (torch.tensor(values) for values in zip(*scored, strict=True))
    return _Batch(
        ids=ids.to(device),
        first=first,
        rows=places.to(device),
        columns=(columns - first).to(device),
        targets=targets.to(device),
        owners=owners.numpy(),
    )


def _score(model: torch.nn.Module, batch: _Batch) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Log-probability of each scored token in float32, and whether it is the most likely one."""
    keep = batch.ids.shape[1] - batch.first
    if _takes_logits_to_keep(model):
        logits = model(input_ids=batch.ids, use_cache=False, logits_to_keep=keep).logits
    else:
        logits = model(input_ids=batch.ids, use_cache=False).logits[:, -keep:]
    logits = logits[batch.rows, batch.columns].to(torch.float32)
    chosen = functional.log_softmax(logits, dim=-1).gather(1, batch.targets[:, None])[:, 0]
    greedy = logits.argmax(dim=-1) == batch.targets
    return chosen.cpu().numpy().astype(np.float64), greedy.cpu().numpy()


def _takes_logits_to_keep(model: torch.nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters
