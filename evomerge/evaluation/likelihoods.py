"""Log-likelihood requests as frozen batches: tokenized, deduplicated, sorted and padded once, run for every candidate.

Requests with the same context + continuation[:-1] share a row, as the one-token options of a question do. Where the
model can take packed rows, the other options of a document are packed into a row behind their common prefix. The head
is applied only to the columns that are read. Rows are padded on the right, which a causal model does not see. Batches
never change, because the composition of a batch changes the last digits of the logits.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.evaluation.packing import PADDING, PackedRow, Tokens, attention, pack

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
Answers = NDArray[np.float64]  # for each request: its log-likelihood, how many tokens are not greedy, its margin
MOST_READS = 4096  # per batch: each read column costs a row of logits over the whole vocabulary


def tolerance(dtype: torch.dtype) -> float:
    """By how much, in nats per token, two ways of computing a log-likelihood may differ for weights of a dtype."""
    return _TOLERANCE.get(dtype, 0.1)


@dataclass(frozen=True, slots=True)
class Request:
    """A request for the log-likelihood of a continuation after a context.

    context: its tokens, at least one.
    continuation: its tokens, at least one.
    document: the number of its document; requests of the same document may be packed together.
    """

    context: Tokens
    continuation: Tokens
    document: int | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """What a model makes of a request.

    log_likelihood: the sum of the log-probabilities of the continuation's tokens.
    greedy: whether greedy decoding would have written the continuation.
    margin: the logit of a continuation's token less that of the likeliest other token, at the token where this is
        smallest. Negative where the continuation is not greedy.
    """

    log_likelihood: float
    greedy: bool
    margin: float


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of a batch.

    packed: its tokens.
    scored: for each scored token the column that predicts it, the token, and the number of the request.
    """

    packed: PackedRow
    scored: tuple[tuple[int, int, int], ...]

    @property
    def length(self) -> int:
        return len(self.packed.tokens)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that the model runs together.

    ids: tokens, shape (rows, length).
    positions: the position of each token, shape (rows, length); None where no row is packed.
    segments: the option that each token belongs to (`PackedRow.segments`), shape (rows, length); None likewise.
    reads: the places in the flattened ids whose logits are needed, shape (reads,).
    places: for each scored token, the index into `reads`, shape (tokens,).
    targets: the scored tokens, shape (tokens,).
    owners: for each scored token, the number of its request, shape (tokens,).
    """

    ids: torch.Tensor
    positions: torch.Tensor | None
    segments: torch.Tensor | None
    reads: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    owners: NDArray[np.int64]

    def inputs(self, model: Any) -> dict[str, Any]:
        """The arguments for a call of the model: ids, and where the rows are packed the mask and the positions."""
        plain = {"input_ids": self.ids, "use_cache": False}
        if self.positions is None or self.segments is None:
            return plain
        mask = attention(model.config, self.segments, self.positions)
        return {**plain, "attention_mask": mask, "position_ids": self.positions}


class PreparedRequests:
    """All log-likelihood requests of a split, ready to run."""

    def __init__(
        self,
        requests: Sequence[Request],
        batch_size: int,
        max_length: int,
        device: torch.device,
        packed: bool = False,
        alike: float = 0.0,
    ) -> None:
        """Divides the requests into batches.

        requests: the requests; responses come in their order.
        batch_size: how many rows a batch may have. The rows within a packed row count singly.
        max_length: the model's context in tokens; longer requests lose tokens on the left, as in lm-eval.
        device: where the batches are kept.
        packed: whether the requests of a document may share a row.
        alike: how long the shortest row of a batch is at least, as a share of the longest.
        """
        self.requests, self._max_length, self._device = requests, max_length, device
        self.truncated = sum(len(request.context) + len(request.continuation) > max_length + 1 for request in requests)
        rows = self._rows(packed)
        self._packed = [row for row in rows if len(row.packed.rows) > 1]
        self.batches = [
            _batch(members, device)
            for kind in (False, True)
            for members in _divide([row for row in rows if (len(row.packed.rows) > 1) == kind], batch_size, alike)
        ]

    def _rows(self, packed: bool) -> list[_Row]:
        """Every distinct row with its scored tokens, the longest first."""
        owners: dict[Tokens, list[tuple[int, Tokens]]] = {}
        documents: dict[object, list[Tokens]] = defaultdict(list)
        for owner, request in enumerate(self.requests):
            continuation = request.continuation[-self._max_length :]
            row = (*request.context, *continuation)[-(self._max_length + 1) : -1]
            if row not in owners:
                document = request.document if packed and request.document is not None else row
                documents[document].append(row)
            owners.setdefault(row, []).append((owner, continuation))
        scored_rows = [_scored(packed_row, owners) for rows in documents.values() for packed_row in pack(rows)]
        return sorted(scored_rows, key=lambda row: (-row.length, row.packed.tokens))

    def run(self, model: torch.nn.Module) -> list[Response]:
        """A response per request, in their order."""
        everything = range(len(self.batches))
        return self.responses([(everything, self.answers(model, everything))])

    @torch.inference_mode()
    def answers(self, model: torch.nn.Module, chosen: Sequence[int]) -> Answers:
        """What a model answers to the requests of some batches; shape (3, requests of these batches).

        chosen: the numbers of the batches, ascending. A request is in one batch, and a batch runs as it is, so its
            answers do not depend on which others are chosen.
        """
        if not chosen:
            return np.zeros((3, 0))
        scores = torch.cat([_score(model, self.batches[number]) for number in chosen], dim=1)
        chances, greedy, margins = scores.cpu().numpy().astype(np.float64)
        owners, places = np.unique(self._owners(chosen), return_inverse=True)
        answers = np.zeros((3, len(owners)))
        answers[2] = np.inf
        np.add.at(answers[0], places, chances)
        np.add.at(answers[1], places, 1 - greedy)
        np.minimum.at(answers[2], places, margins)
        return answers

    def responses(self, answered: Sequence[tuple[Sequence[int], Answers]]) -> list[Response]:
        """A response per request, in their order.

        answered: numbers of batches with their answers; every batch once.
        """
        answers = np.zeros((3, len(self.requests)))
        for chosen, own in answered:
            if chosen:
                answers[:, np.unique(self._owners(chosen))] = own
        return [Response(value, missed == 0, margin) for value, missed, margin in answers.T.tolist()]

    def _owners(self, chosen: Sequence[int]) -> NDArray[np.int64]:
        """The number of the request of each scored token of some batches."""
        return np.concatenate([self.batches[number].owners for number in chosen])

    @torch.inference_mode()
    def rehearse(self, model: torch.nn.Module) -> None:
        """Has the model run the batches that take the most memory, and drops the result."""
        sizes = [(batch.ids.numel(), batch.reads.numel()) for batch in self.batches]
        largest = {max(sizes, key=lambda size: size[place]) for place in (0, 1)} if sizes else set()
        for size in sorted(largest):
            _score(model, self.batches[sizes.index(size)])

    def sample(self) -> "tuple[PreparedRequests, PreparedRequests] | None":
        """The requests of the document with the longest branches, once packed and once as full rows.

        A model's responses to both can then be compared. None where nothing is packed.
        """
        if not self._packed:
            return None
        widest = max(self._packed, key=lambda row: row.length - row.packed.prefix)
        document = self.requests[widest.scored[0][2]].document
        requests = [request for request in self.requests if request.document == document]
        both = [PreparedRequests(requests, len(requests), self._max_length, self._device, how) for how in (True, False)]
        return both[0], both[1]


def _scored(packed: PackedRow, owners: dict[Tokens, list[tuple[int, Tokens]]]) -> _Row:
    """A packed row with its scored tokens."""
    scored = []
    for row, offset in zip(packed.rows, packed.offsets(), strict=True):
        for owner, continuation in owners[row]:
            for column, target in enumerate(continuation, len(row) - len(continuation)):
                scored.append((column if column < packed.prefix else column + offset, target, owner))
    return _Row(packed, tuple(scored))


def _divide(rows: Sequence[_Row], batch_size: int, alike: float) -> Iterator[list[_Row]]:
    """Rows in their order, in batches of at most `batch_size` single rows and `MOST_READS` columns that are read.

    rows: the longest first.
    batch_size: see above.
    alike: how long the shortest row of a batch is at least, as a share of the longest.
    """
    batch: list[_Row] = []
    singles = reads = 0
    for row in rows:
        wanted = len({column for column, _, _ in row.scored})
        full = singles + len(row.packed.rows) > batch_size or reads + wanted > MOST_READS
        if batch and (full or row.length < alike * batch[0].length):
            yield batch
            batch, singles, reads = [], 0, 0
        batch.append(row)
        singles += len(row.packed.rows)
        reads += wanted
    if batch:
        yield batch


def _batch(rows: Sequence[_Row], device: torch.device) -> Batch:
    length = max(row.length for row in rows)

    def padded(lists: Iterator[Sequence[int]], value: int = 0) -> torch.Tensor:
        return torch.tensor([[*numbers, *[value] * (length - len(numbers))] for numbers in lists], device=device)

    packed = any(len(row.packed.rows) > 1 for row in rows)
    scored = [(place * length + column, *rest) for place, row in enumerate(rows) for column, *rest in row.scored]
    columns, targets, owners = (np.array(values) for values in zip(*scored, strict=True))
    reads, places = np.unique(columns, return_inverse=True)
    return Batch(
        ids=padded(row.packed.tokens for row in rows),
        positions=padded(row.packed.positions for row in rows) if packed else None,
        segments=padded((row.packed.segments for row in rows), PADDING) if packed else None,
        reads=torch.from_numpy(reads).to(device),
        places=torch.from_numpy(places).to(device),
        targets=torch.from_numpy(targets).to(device),
        owners=owners,
    )


def likelihoods(model: Any, prepared: PreparedRequests) -> torch.Tensor:
    """The log-likelihood of each request, float32, shape (requests,), through which gradients can flow back.

    model: a causal model of transformers.
    prepared: the requests.
    """
    total: torch.Tensor | None = None
    for batch in prepared.batches:
        logits = read_logits(model, batch).to(torch.float32)
        places, targets = batch.places.to(logits.device), batch.targets.to(logits.device)
        chosen = logits.log_softmax(dim=-1)[places, targets]
        owners = torch.from_numpy(batch.owners).to(logits.device)
        # index_put adds up in a fixed order on GPUs, too, which index_add does not
        sums = chosen.new_zeros(len(prepared.requests)).index_put((owners,), chosen, accumulate=True)
        total = sums if total is None else total + sums
    assert total is not None
    return total


def entropies(model: Any, prepared: PreparedRequests) -> torch.Tensor:
    """The entropy of what a model expects in the place of each request's continuation, in nats, summed over its tokens;
    float32, shape (requests,). Gradients can flow back through it.

    model: a causal model of transformers.
    prepared: the requests.
    """
    total: torch.Tensor | None = None
    for batch in prepared.batches:
        chances = read_logits(model, batch).to(torch.float32).log_softmax(dim=-1)
        expected = -(chances.exp() * chances).sum(-1)[batch.places.to(chances.device)]
        owners = torch.from_numpy(batch.owners).to(chances.device)
        sums = expected.new_zeros(len(prepared.requests)).index_put((owners,), expected, accumulate=True)
        total = sums if total is None else total + sums
    assert total is not None
    return total


def _score(model: Any, batch: Batch) -> torch.Tensor:
    """For each scored token its log-probability, 1 where it is the likeliest (else 0), and its lead in the logits over
    the likeliest other token; float32, shape (3, tokens)."""
    logits = read_logits(model, batch).to(torch.float32)
    best, second = logits.topk(2, dim=-1).values.unbind(-1)
    places, targets = batch.places.to(logits.device), batch.targets.to(logits.device)  # the head may be elsewhere
    likeliest = logits.argmax(dim=-1)[places] == targets
    own = logits[places, targets]
    other = torch.where(likeliest, second[places], best[places])
    # log_softmax as in lm-eval: near probability 1, own - logsumexp would keep no more digits than the logits have
    chosen = logits.log_softmax(dim=-1)[places, targets]
    return torch.stack([chosen, likeliest.to(torch.float32), own - other])


def read_logits(model: Any, batch: Batch) -> torch.Tensor:
    """The logits at a batch's reads, shape (reads, vocabulary).

    model: a causal model of transformers.
    batch: the rows that it runs.
    """
    return logits_at(model, batch.inputs(model), batch.reads)


def logits_at(model: Any, inputs: Mapping[str, Any], reads: torch.Tensor) -> torch.Tensor:
    """The logits at some places, shape (reads, vocabulary).

    model: a causal model of transformers.
    inputs: the arguments of the call.
    reads: places in the flattened ids, shape (reads,).
    """
    with _head_reads(model, reads):
        logits: torch.Tensor = model(**inputs).logits
    if logits.shape[:2] == (1, len(reads)):  # only the reads, or a single row of which every column is read
        return logits[0]
    return logits.flatten(0, 1)[reads.to(logits.device)]


@contextlib.contextmanager
def _head_reads(model: Any, reads: torch.Tensor) -> Iterator[None]:
    """A context in which the model's head, and what follows it, computes only the columns that are read."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        yield
        return

    def read(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        columns = reads.to(inputs[0].device)
        return inputs[0].flatten(0, 1)[columns][None], *inputs[1:]

    handle = head.register_forward_pre_hook(read)
    try:
        yield
    finally:
        handle.remove()
