"""Texts to be written, in fixed batches: prompts with the same arguments together, sorted by length.

Sampled texts are always drawn from the same seed. A batch stops as soon as each of its texts has ended, by the model's
end token or by a stop string of the task.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from evomerge.devices import seeded
from evomerge.errors import InputError

SAMPLING_SEED = 1234


@dataclass(frozen=True, slots=True)
class GenerationBatch:
    """Prompts whose texts are written together.

    members: the number of each prompt's instance.
    ids: the tokens of the prompts, shape (members, length), padded on the left.
    mask: 1 for tokens and 0 for padding, shape (members, length).
    stop: the strings at which a text ends.
    arguments: the arguments of generation, `max_length` among them: tokens of prompt and text together.
    """

    members: tuple[int, ...]
    ids: torch.Tensor
    mask: torch.Tensor
    stop: list[str]
    arguments: Mapping[str, Any]

    @property
    def prompts(self) -> list[list[int]]:
        """The tokens of each prompt, without padding."""
        return [ids[mask.bool()].tolist() for ids, mask in zip(self.ids, self.mask, strict=True)]

    @property
    def fresh(self) -> int:
        """How many new tokens a text may have."""
        return int(self.arguments["max_length"]) - self.ids.shape[1]


class Writer(Protocol):
    """Writes texts with the resident model's weights."""

    def write(self, batches: Sequence[GenerationBatch]) -> list[list[list[int]]]:
        """For each batch, the tokens of its texts without their prompts. The same weights write the same texts."""


class TransformersWriter:
    """A writer that uses the resident model itself."""

    def __init__(self, lm: Any) -> None:
        """lm: lm-eval's model, which holds the resident one."""
        self._lm = lm

    def write(self, batches: Sequence[GenerationBatch]) -> list[list[list[int]]]:
        """See `Writer`."""
        with seeded([self._lm.device], SAMPLING_SEED):
            return [
                self._lm._model_generate(
                    context=batch.ids, attention_mask=batch.mask, stop=batch.stop, **batch.arguments
                )[:, batch.ids.shape[1] :].tolist()
                for batch in batches
            ]


class GenerationPlan:
    """generate_until requests in fixed batches: prompts with the same arguments together, sorted by length.

    batches: the batches, in the order in which they are written.
    truncated: how many prompts lost their beginning, since they do not fit the model's context.
    """

    def __init__(self, lm: Any, instances: Sequence[Any], batch_size: int) -> None:
        """Tokenizes the prompts and divides them into batches.

        lm: lm-eval's model, which holds the resident one.
        instances: lm-eval's requests.
        batch_size: how many prompts a batch may have.
        Raises InputError where a task asks for more new tokens than the model's context holds.
        """
        self._lm, self._instances, self._batch_size = lm, instances, batch_size
        groups: dict[str, list[int]] = defaultdict(list)
        for number, instance in enumerate(instances):
            groups[repr(instance.args[1])].append(number)
        self.truncated = 0
        self.batches = [batch for members in groups.values() for batch in self._group(members)]

    def _group(self, members: Sequence[int]) -> Iterator[GenerationBatch]:
        """The batches of instances, given by their numbers, that all have the same arguments."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        first = self._instances[members[0]]
        arguments = dict(normalize_gen_kwargs(dict(first.args[1]), self._lm.max_gen_toks))
        end = self._lm.tok_decode(self._lm.eot_token_id, skip_special_tokens=False)
        stop = handle_stop_sequences(arguments.pop("until", None), eos=end)
        fresh = arguments.pop("max_gen_toks")
        room = self._lm.max_length - fresh
        if room <= 0:
            raise InputError(
                f"task '{first.task_name}' asks for {fresh} new tokens, but the model's context holds only "
                f"{self._lm.max_length}; set generation_kwargs.max_gen_toks below that in the task's file."
            )
        lengths = {number: len(self._lm.tok_encode(self._instances[number].args[0])) for number in members}
        self.truncated += sum(length > room for length in lengths.values())
        # Greedy answers to the same question are all alike; sampled answers are drawn as often as the task asks.
        copies = {number: self._instances[number].repeats if arguments.get("do_sample") else 1 for number in members}
        queue = [n for n in sorted(members, key=lambda n: (-lengths[n], n)) for _ in range(copies[n])]
        for start in range(0, len(queue), self._batch_size):
            batch = tuple(queue[start : start + self._batch_size])
            prompts = [self._instances[number].args[0] for number in batch]
            ids, mask = self._lm.tok_batch_encode(prompts, left_truncate_len=room)
            limits = {"max_length": ids.shape[1] + fresh, **arguments}
            yield GenerationBatch(batch, ids.to(self._lm.device), mask.to(self._lm.device), stop, limits)

    def run(self, writer: Writer) -> list[list[str]]:
        """The texts of each instance, as many as its task asks for. The same weights give the same texts."""
        from lm_eval.models.utils import postprocess_generated_text

        texts: list[list[str]] = [[] for _ in self._instances]
        written = writer.write(self.batches) if self.batches else []
        for batch, texts_of_batch in zip(self.batches, written, strict=True):
            for number, tokens in zip(batch.members, texts_of_batch, strict=True):
                text = self._lm.tok_decode(tokens)
                texts[number].append(postprocess_generated_text(generation=text, stop=batch.stop, think_end_token=None))
        return [
            answers * (instance.repeats // len(answers))
            for instance, answers in zip(self._instances, texts, strict=True)
        ]

    @torch.inference_mode()
    def rehearse(self) -> None:
        """Has the model read the texts of the largest batch at their full length, which needs the largest cache."""
        if self.batches:
            rows, length = max((len(batch.members), batch.arguments["max_length"]) for batch in self.batches)
            ids = torch.zeros((rows, length), dtype=torch.int64, device=self._lm.device)
            self._lm.model(input_ids=ids, use_cache=True, logits_to_keep=1)
