"""Words, questions and options for tasks that are written on the spot, and what is asked of a harness or a search."""

from random import Random

from evomerge.evaluation.harness import Harness
from evomerge.evaluation.items import Division
from evomerge.evaluation.loading import check_metrics, distinct_tasks, load_targets
from evomerge.zoo.language import DIGITS, NAMES, NUMBERS, OBJECTS, VERBS

WORDS = (*DIGITS, *NAMES, *NUMBERS, *OBJECTS, *VERBS)
MEAN = {"aggregation": "mean", "higher_is_better": True}
ARCHITECTURES = ("llama", "qwen2", "gpt2", "gemma3")


def sentence(rng, low, high):
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def questions(count, seed=0):
    """Different questions, each with an answer of one to three words."""
    rng = Random(seed)
    rows = {sentence(rng, 3, 9): sentence(rng, 1, 3) for _ in range(2 * count)}
    return [{"question": question, "answer": answer} for question, answer in list(rows.items())[:count]]


def choices(count, seed=0):
    """Questions with two to four options of one to four words, some of them sharing their first words."""
    rng = Random(seed)
    rows = []
    for _ in range(count):
        stem = sentence(rng, 1, 2)
        options = [*dict.fromkeys([stem, f"{stem} {sentence(rng, 1, 2)}", *(sentence(rng, 1, 2) for _ in range(2))])]
        rows.append({"question": sentence(rng, 2, 8), "options": options, "gold": rng.randrange(len(options))})
    return rows


def asked(config, model, split):
    """The questions that a harness asks, in order."""
    harness = Harness(config, *model)
    harness.evaluate(split)
    return [instance.doc["question"] for instance in harness._splits[split].whole.likelihoods]


def check(config):
    """The objectives, as the tasks complete them; raises where tasks lack what a search asks of them."""
    targets = load_targets(config.measured, config.tasks, config.evaluation)
    checked = check_metrics(config, targets).objectives
    Division(distinct_tasks(targets), config.items)
    return checked
