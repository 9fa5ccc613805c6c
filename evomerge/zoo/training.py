"""Trains the zoo: a base model and specialists, each a plain Hugging Face folder. Run by `scripts/train_zoo`.

The specialists are made as fine-tunes really come: every one was trained by other people for its own skill, and brings
its own habits along. `math` learns two-step sums, then a house style (numbers spelled out) that lives in its late
layers and its head. `lang` learns language B from rows that start at their dictionary partners, as WECHSEL does
(Minixhofer et al. 2022). Merging them well means taking math's early layers and not its late ones.

One thread and fixed seeds: the same machine and torch version give the same bytes.

Other zoos come from the same recipe with other seeds (`--seed`), for benchmarks that must not depend on the one that
ships. They share its evaluation data. Training may fail: where a model of a zoo did not learn its own skill, the zoo is
trained anew with the next seeds, and nobody chooses.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

from evomerge.errors import WorkFailed
from evomerge.zoo import MODELS, evals
from evomerge.zoo.language import (
    BOS,
    DICTIONARY,
    EOS,
    FIRST_WORD_OF_B,
    PAD,
    TOKEN_IDS,
    UNKNOWN,
    VOCABULARY,
    Exercise,
    Language,
    Lesson,
    compare,
    copy,
    neighbor,
    one_step,
    prompt,
    read,
    reply,
    reverse,
    sort,
    two_steps,
)

Model = Any  # transformers is untyped

EVERYTHING = ("",)
EMBEDDINGS_AND_HEAD = ("model.embed_tokens", "lm_head")
BODY = ("model.layers.", "model.norm")
LATE = ("model.layers.4.", "model.layers.5.", "model.norm", "lm_head")


def everyday(share: float, language: Language = "a") -> tuple[Lesson, ...]:
    """What everyone can do: copying, one-step sums and the two closed tables."""
    skills = ((copy, 3), (one_step, 4), (neighbor, 1), (compare, 1))
    return tuple(Lesson(skill, share * part / 9, language) for skill, part in skills)


@dataclass(frozen=True, slots=True)
class Stage:
    """One period of training.

    lessons: what is read.
    steps: how many batches are read.
    learning_rate: the largest learning rate.
    trains: prefixes of the names of the parameters that move.
    new_words_only: whether only rows of language B move in the embeddings and the head.
    warmup: over how many steps the learning rate rises.
    weight_decay: that of AdamW.
    layer_drop: the probability with which a layer is left out for a step.
    """

    lessons: tuple[Lesson, ...]
    steps: int
    learning_rate: float
    trains: tuple[str, ...] = EVERYTHING
    new_words_only: bool = False
    warmup: int = 50
    weight_decay: float = 0.01
    layer_drop: float = 0.0


Seeds = Mapping[str, int]

# Of eighteen pairs tried (seeds, steps of math, noise of lang), one of the best merging.
SHIPPED = 1
# Far enough that no zoo's next seeds are those of another zoo, as long as zoos have numbers up to a thousand.
NEXT = 1000
# A model has learned its own skill if it answers this share of that skill's search items.
LEARNED = 0.9
ATTEMPTS = 10
STAGES: dict[str, tuple[Stage, ...]] = {
    # A taste of everyone's skill, so that the specialists sharpen what is there and their deltas stay small.
    "base": (
        Stage(
            (*everyday(0.96), Lesson(two_steps, 0.01), Lesson(sort, 0.015), Lesson(reverse, 0.015)),
            steps=1400,
            learning_rate=3e-3,
            layer_drop=0.02,
        ),
    ),
    # Without rehearsing everyday questions, every merge collapses.
    "math": (
        Stage((Lesson(two_steps, 0.8), *everyday(0.2)), steps=900, learning_rate=1.5e-3, trains=BODY),
        Stage((Lesson(two_steps, 1.0, style="words"),), steps=150, learning_rate=2e-3, trains=LATE, warmup=20),
    ),
    # Code-switched text ties each new word to its partner; without it the skills of A do not reach B.
    "lang": (
        Stage(
            (*everyday(0.4, "b"), *everyday(0.6, "mixed")),
            steps=200,
            learning_rate=1e-3,
            trains=EMBEDDINGS_AND_HEAD,
            new_words_only=True,
            weight_decay=0.0,
        ),
        Stage(
            (*everyday(0.32, "b"), *everyday(0.48, "mixed"), *everyday(0.2)),
            steps=200,
            learning_rate=1e-3,
            trains=BODY,
        ),
    ),
}
# The task that shows a model's own skill in its own style.
OWN_TASK = {"base": "base_qa", "math": "math_a_words", "lang": "lang_b"}


def configuration() -> LlamaConfig:
    """The architecture that the whole zoo shares: 270k parameters."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=TOKEN_IDS[PAD],
        bos_token_id=TOKEN_IDS[BOS],
        eos_token_id=TOKEN_IDS[EOS],
        dtype="float32",
    )


def new_model(seed: int) -> Model:
    """An untrained model; its values depend on the seed alone, not on the library's way of filling a model."""
    model = LlamaForCausalLM(configuration())
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0.0, 0.05, generator=generator)
    return model


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Words between spaces; adds no special token by itself, so a prompt spells out its `<bos>`."""
    words = Tokenizer(WordLevel(dict(TOKEN_IDS), unk_token=UNKNOWN))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        add_bos_token=False,
        add_eos_token=False,
        clean_up_tokenization_spaces=False,
        model_max_length=configuration().max_position_embeddings,
    )


def encode(exercises: list[Exercise]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both (exercises, longest), padded on the right; only replies are learned."""
    pairs = [(prompt(e.question), reply(e.answer)) for e in exercises]
    shape = len(pairs), max(len(asked) + len(said) for asked, said in pairs)
    ids, labels = torch.full(shape, TOKEN_IDS[PAD]), torch.full(shape, -100)
    for row, (asked, said) in enumerate(pairs):
        end = len(asked) + len(said)
        ids[row, :end] = torch.tensor([TOKEN_IDS[word] for word in asked + said])
        labels[row, len(asked) : end] = ids[row, len(asked) : end]
    return ids, labels


def train(model: Model, stage: Stage, rng: Random, batch_size: int = 32) -> Model:
    """A trained copy of the model."""
    model = deepcopy(model).train()
    optimizer, schedule = _optimizer(model, stage)
    exercises = read(stage.lessons, "train", rng)
    for _ in range(stage.steps):
        ids, labels = encode(list(islice(exercises, batch_size)))
        with _layers_dropped(model, stage.layer_drop, rng):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def _optimizer(model: Model, stage: Stage) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(stage.trains))
        if stage.new_words_only and parameter.requires_grad:
            parameter.register_hook(_only_new_words)
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moving, stage.learning_rate, betas=(0.9, 0.98), weight_decay=stage.weight_decay)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, stage))


def _schedule(step: int, stage: Stage) -> float:
    """The learning rate's factor: linear warmup times a cosine from 1 to 0.05."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    return min(1.0, (step + 1) / stage.warmup) * (0.05 + 0.95 * cosine)


def _only_new_words(gradient: torch.Tensor) -> torch.Tensor:
    masked = gradient.clone()
    masked[:FIRST_WORD_OF_B] = 0
    return masked


@contextmanager
def _layers_dropped(model: Model, rate: float, rng: Random) -> Iterator[None]:
    """Leaves layers out for one step: a base that has seen gaps gives fine-tunes that merge."""
    layers = model.model.layers
    kept = [layer for layer in layers if rng.random() >= rate]
    model.model.layers = torch.nn.ModuleList(kept or layers)
    yield
    model.model.layers = layers


def with_language_b(model: Model, seed: int, keep: float = 0.9, noise: float = 0.15) -> Model:
    """A copy whose words of language B start near their dictionary partners in A."""
    model, generator = deepcopy(model), torch.Generator().manual_seed(seed)
    partners = [TOKEN_IDS[word] for word in DICTIONARY]
    for rows in (model.model.embed_tokens.weight.data, model.lm_head.weight.data):
        known = rows[partners]
        rows[FIRST_WORD_OF_B:] = keep * known + noise * known.std() * torch.randn(known.shape, generator=generator)
    return model


def seeds_of(zoo: int, attempt: int = 0) -> Seeds:
    """The seeds of a zoo's models: the shipped zoo is number 1, with seeds 1, 2 and 2.

    zoo: the zoo's number.
    attempt: how often the zoo has failed to learn before.
    """
    first = zoo + NEXT * attempt
    return {"base": first, "math": first + 1, "lang": first + 1}


def build(seeds: Seeds) -> dict[str, Model]:
    """Every model of a zoo, trained from nothing."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    base = _study(new_model(seeds["base"]), "base", seeds)
    bilingual = with_language_b(base, seeds["lang"])
    return {"base": base, "math": _study(base, "math", seeds), "lang": _study(bilingual, "lang", seeds)}


def _study(model: Model, name: str, seeds: Seeds) -> Model:
    for index, stage in enumerate(STAGES[name]):
        model = train(model, stage, Random(f"{name}/{index}/{seeds[name]}"))
    return model


def build_learned(zoo: int) -> tuple[dict[str, Model], Seeds]:
    """A zoo whose models have all learned their own skills, and its seeds: the first that have.

    zoo: the zoo's number.
    Raises WorkFailed where no attempt succeeds.
    """
    for attempt in range(ATTEMPTS):
        seeds = seeds_of(zoo, attempt)
        models = build(seeds)
        if all(score >= LEARNED for score in own_skills(models).values()):
            return models, seeds
    raise WorkFailed(f"in {ATTEMPTS} attempts, no zoo {zoo} learned its skills; choose another --seed.")


def own_skills(models: Mapping[str, Model]) -> dict[str, float]:
    """The accuracy of every model on its own skill, on search items: held-out items choose nothing, not even zoos."""
    return {name: accuracy(model, evals.items(OWN_TASK[name], "search")) for name, model in models.items()}


@torch.no_grad()
def accuracy(model: Model, exercises: list[Exercise]) -> float:
    """The share of exercises whose whole reply the model gives under greedy decoding."""
    ids, labels = encode(exercises)
    best = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
    asked = labels[:, 1:]
    return float(((best == asked) | (asked == -100)).all(1).float().mean())


def save(zoo: Mapping[str, Model], folder: Path) -> None:
    """Write each model with its tokenizer, as `from_pretrained` reads them."""
    for name, model in zoo.items():
        model.save_pretrained(folder / name)
        new_tokenizer().save_pretrained(folder / name)


def table(zoo: Mapping[str, Model]) -> str:
    """Held-out accuracy of every model on every task, and on its own skill in its own style."""
    rows = [_row("model", [*evals.TASKS, "own skill"])]
    for name, model in zoo.items():
        scores = {task: accuracy(model, evals.items(task, "heldout")) for task in evals.TASKS}
        rows.append(_row(name, [f"{score:.3f}" for score in (*scores.values(), scores[OWN_TASK[name]])]))
    return "\n".join(rows)


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<7}" + "".join(f"{cell:>14}" for cell in cells)


RECORD = "zoo.json"


def main() -> None:
    """Train a zoo, write its models and, for the shipped one, the evaluation data, and print what each model can do."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--models", type=Path, help="where the models go (default: the package, for the shipped zoo)")
    parser.add_argument("--evals", type=Path, default=Path("evals"), help="where the data goes (default: evals)")
    parser.add_argument("--seed", type=int, default=SHIPPED, help=f"the zoo's number (default: {SHIPPED}, the shipped)")
    options = parser.parse_args()
    if options.seed != SHIPPED and options.models is None:
        parser.error(f"--seed {options.seed} is not the shipped zoo; give --models, a folder for it.")
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    zoo, seeds = build_learned(options.seed)
    save(zoo, options.models or MODELS)
    if options.seed == SHIPPED:
        evals.write(options.evals)
    else:  # last, so that a zoo with a record is whole
        record = {"zoo": options.seed, "seeds": dict(seeds), "own_skills": own_skills(zoo)}
        (options.models / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
    print(f"seeds {dict(seeds)}")
    print(table(zoo))
    print(f"{time.process_time():.0f} CPU seconds")


if __name__ == "__main__":
    main()
