"""Calibration items: what statistics of a model are measured on, and the likelihoods whose gradients are squared."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from evomerge.config.scoring import StatisticsConfig
from evomerge.errors import InputError
from evomerge.evaluation.likelihoods import PreparedRequests, Request, likelihoods, read_logits
from evomerge.evaluation.losses import Item
from evomerge.evaluation.packing import Tokens
from evomerge.randomness import counter_rng


class Calibration:
    """Items, each with its likelihood and the rows that a model reads for it.

    items: the items, in their order.
    """

    def __init__(self, items: Sequence[Item], max_length: int) -> None:
        """items: the items.
        max_length: the model's context in tokens.
        """
        self.items, self._max_length = tuple(items), max_length

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that stand for the tokens of all items and what is right about them."""
        digest = hashlib.sha256()
        for item in self.items:
            content = [[request.context, request.continuation] for request in item.requests]
            digest.update(json.dumps([content, item.right, item.lengths]).encode())
        return digest.hexdigest()[:16]

    @cached_property
    def rows(self) -> list[Tokens]:
        """What a model reads with the right answers, each row once, the longest first."""
        return sorted(self.answers, key=lambda row: (-len(row), row))

    @cached_property
    def answers(self) -> dict[Tokens, int]:
        """By what a model reads with a right answer, in the order of the items: the first token of the answer."""
        rows: dict[Tokens, int] = {}
        for item in self.items:
            right = [each for each, is_right in zip(item.requests, item.right, strict=False) if is_right]
            for request in right or item.requests:
                row = (*request.context, *request.continuation)[-self._max_length :]
                rows.setdefault(row, max(1, len(row) - len(request.continuation)))
        return rows

    def batches(self, size: int) -> list[torch.Tensor]:
        """The rows as batches without padding, so all rows of a batch are equally long; int64, shape (rows, length).

        size: how many rows a batch may have.
        """
        by_length: dict[int, list[Tokens]] = {}
        for row in self.rows:
            by_length.setdefault(len(row), []).append(row)
        return [
            torch.tensor(rows[start : start + size])
            for rows in by_length.values()
            for start in range(0, len(rows), size)
        ]

    def loss(self, model: Any, number: int, drawn: bool) -> torch.Tensor:
        """The negative log-likelihood of the answer to an item, a scalar through which gradients flow back.

        model: a causal model of transformers.
        number: which item.
        drawn: whether the answer is drawn from the model's own predictions: an option where there are options, or else
            each token after the tokens of the reference before it. By default it is the reference.
        """
        item = self.items[number]
        requests = PreparedRequests(item.requests, len(item.requests), self._max_length, model.device)
        if drawn and not item.right:
            return self._drawn_text(model, requests, item, number)
        values = likelihoods(model, requests)
        if drawn:
            count = len(item.right)
            scores = (values[:count] - values[count:] if len(values) > count else values).detach().double().cpu()
            chances = torch.softmax(scores / torch.tensor(item.lengths[:count], dtype=torch.float64), dim=0)
            chosen = int(_drawn(chances[None], number)[0])
            item = replace(item, right=tuple(place == chosen for place in range(count)))
        return item.loss(values)

    def _drawn_text(self, model: Any, requests: PreparedRequests, item: Item, number: int) -> torch.Tensor:
        total: torch.Tensor | None = None
        for batch in requests.batches:
            logs = read_logits(model, batch).to(torch.float32).log_softmax(dim=-1)[batch.places]
            chosen = _drawn(logs.detach().double().exp().cpu(), number).to(logs.device)
            lengths = logs.new_tensor(item.lengths)[torch.from_numpy(batch.owners).to(logs.device)]
            loss = -(logs.gather(1, chosen[:, None])[:, 0] / lengths).sum()
            total = loss if total is None else total + loss
        assert total is not None
        return total


def _drawn(chances: torch.Tensor, number: int) -> torch.Tensor:
    """An index for each row of probabilities, drawn with random numbers that depend on the item's number alone."""
    uniform = torch.from_numpy(counter_rng(0, "labels", number).random(len(chances)))
    ends = chances.cumsum(dim=1)
    return (ends < uniform[:, None] * ends[:, -1:]).sum(dim=1).clamp(max=chances.shape[1] - 1)


def texts_of(file: Path, lm: Any, settings: StatisticsConfig, length: int) -> list[Item]:
    """The texts of a file as items.

    file: texts, one on a line, or JSON lines with a `text`.
    lm: lm-eval's model, which has the tokenizer.
    settings: how many texts are used.
    length: how many tokens of a text are used.
    Raises InputError for a file that cannot be read, or has no text of two tokens or more.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        texts = [str(json.loads(line)["text"]) if file.suffix == ".jsonl" else line for line in lines if line.strip()]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"statistics.texts: {file} cannot be read ({error}); give a file with one text on a line, or a .jsonl file "
            'whose lines are like {"text": "..."}.'
        ) from None
    items = []
    for text in texts[: settings.items]:
        tokens = lm.tok_encode(text)[:length]
        if len(tokens) > 1:
            request = Request(tuple(tokens[:1]), tuple(tokens[1:]))
            items.append(Item("texts", (request,), (), (1.0,)))
    if not items:
        raise InputError(f"statistics.texts: {file} has no text of at least two tokens; give another file.")
    return items
