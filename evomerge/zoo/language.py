"""The zoo's world: two languages, seven skills, and questions dealt out so that no split shares one.

Language A borrows English words. Language B is invented: A word for word, with other words. Names and digits belong
to both. A question goes to training, search or held-out by a hash of its wording in A, so neither a question nor its
translation is ever on two sides. All randomness comes from the `Random` that callers pass.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal
from zlib import crc32

Words = tuple[str, ...]
Split = Literal["train", "search", "heldout"]
Language = Literal["a", "b", "mixed"]  # mixed: each word of a question in either language, as bilingual speakers do
Style = Literal["digits", "words"]

DIGITS = tuple("0123456789")
NAMES = ("tom", "ann", "bob", "eve", "sam", "kim")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OBJECTS = ("apples", "pears", "coins", "books", "cups", "keys")
VERBS = ("has", "gets", "loses", "how", "many", "after", "before", "more", "or", "sort", "reverse", "copy")
NUMBERS_B = ("nol", "uni", "dva", "tria", "kvar", "penta", "heks", "sept", "okto", "nau")
OBJECTS_B = ("melo", "piro", "mono", "libro", "taso", "klavo")
VERBS_B = ("havi", "akiri", "perdi", "kiom", "multa", "post", "antau", "pli", "au", "ordi", "turni", "kopi")

WORDS_A = NUMBERS + OBJECTS + VERBS
WORDS_B = NUMBERS_B + OBJECTS_B + VERBS_B
DICTIONARY = dict(zip(WORDS_A, WORDS_B, strict=True))
_DICTIONARY_TO_A = {word_b: word_a for word_a, word_b in DICTIONARY.items()}
SPELLED = dict(zip(DIGITS, NUMBERS, strict=True))

PAD, BOS, EOS, UNKNOWN = SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
# A word's place here is its token id. Language B comes last: its rows are one slice of the embeddings and the head.
VOCABULARY = (*SPECIAL, "Q", "=", ".", *DIGITS, *NAMES, *WORDS_A, *WORDS_B)
TOKEN_IDS = {word: token_id for token_id, word in enumerate(VOCABULARY)}
FIRST_WORD_OF_B = TOKEN_IDS[WORDS_B[0]]


@dataclass(frozen=True, slots=True)
class Exercise:
    """A question and its answer, as words."""

    question: Words
    answer: Words


Skill = Callable[[Random], Exercise]


def copy(rng: Random) -> Exercise:
    """Repeat the words that follow."""
    words = tuple(rng.choice(WORDS_A + NAMES) for _ in range(rng.randint(2, 4)))
    return Exercise(("copy", *words), words)


def neighbor(rng: Random) -> Exercise:
    """The number just after or just before another."""
    smaller = rng.randrange(9)
    if rng.random() < 0.5:
        return Exercise(("after", NUMBERS[smaller]), (DIGITS[smaller + 1],))
    return Exercise(("before", NUMBERS[smaller + 1]), (DIGITS[smaller],))


def compare(rng: Random) -> Exercise:
    """The larger of two numbers."""
    one, other = rng.sample(range(10), 2)
    return Exercise(("more", NUMBERS[one], "or", NUMBERS[other]), (DIGITS[max(one, other)],))


def one_step(rng: Random) -> Exercise:
    """What someone has after one gain or loss: everyday counting."""
    return _story(rng, steps=1)


def two_steps(rng: Random) -> Exercise:
    """What someone has after two gains or losses: the math specialist's skill."""
    return _story(rng, steps=2)


def _story(rng: Random, steps: int) -> Exercise:
    name, thing, count = rng.choice(NAMES), rng.choice(OBJECTS), rng.randrange(10)
    words = [name, "has", NUMBERS[count], thing, "."]
    for _ in range(steps):
        gains = rng.random() < 0.5
        change = rng.randrange(10 - count if gains else count + 1)  # the count stays one digit
        count += change if gains else -change
        words += [name, "gets" if gains else "loses", NUMBERS[change], "."]
    return Exercise((*words, "how", "many", thing), (DIGITS[count],))


def sort(rng: Random) -> Exercise:
    """Three or four numbers in order."""
    numbers = rng.sample(range(10), rng.choice([3, 4]))
    return Exercise(("sort", *(NUMBERS[n] for n in numbers)), tuple(DIGITS[n] for n in sorted(numbers)))


def reverse(rng: Random) -> Exercise:
    """Three or four numbers from last to first."""
    numbers = rng.sample(range(10), rng.choice([3, 4]))
    return Exercise(("reverse", *(NUMBERS[n] for n in numbers)), tuple(DIGITS[n] for n in numbers[::-1]))


# Too few questions to hold any back: taught whole, never scored.
CLOSED: frozenset[Skill] = frozenset({neighbor, compare})


def split_of(question: Words) -> Split:
    """The one split that a question, worded in language A, belongs to."""
    slot = crc32(" ".join(question).encode()) % 10
    return "train" if slot < 6 else "search" if slot < 8 else "heldout"


def translate(exercise: Exercise, language: Language, rng: Random) -> Exercise:
    """The same exercise in another language; in "mixed", each of its words is in A or B by a coin flip."""
    known = [word for word in dict.fromkeys(exercise.question) if word in DICTIONARY and language != "a"]
    spoken = {word: DICTIONARY[word] for word in known if language == "b" or rng.random() < 0.5}
    return Exercise(_replace(exercise.question, spoken), _replace(exercise.answer, spoken))


def in_a(question: Words) -> Words:
    """A question in any of the languages, worded in language A."""
    return _replace(question, _DICTIONARY_TO_A)


def restyle(exercise: Exercise, style: Style) -> Exercise:
    """The same exercise with its answer in a house style: plain digits, or numbers spelled out in A."""
    return exercise if style == "digits" else Exercise(exercise.question, _replace(exercise.answer, SPELLED))


def _replace(words: Words, replacements: dict[str, str]) -> Words:
    return tuple(replacements.get(word, word) for word in words)


def draw(skill: Skill, split: Split, language: Language, style: Style, rng: Random) -> Exercise:
    """One exercise of a skill whose question belongs to the split."""
    exercise = skill(rng)
    while skill not in CLOSED and split_of(exercise.question) != split:
        exercise = skill(rng)
    return restyle(translate(exercise, language, rng), style)


@dataclass(frozen=True, slots=True)
class Lesson:
    """One ingredient of what a model reads.

    skill: makes the exercises.
    share: how often they occur, relative to other lessons.
    language: the language of the questions.
    style: the style of the answers.
    """

    skill: Skill
    share: float
    language: Language = "a"
    style: Style = "digits"


def read(lessons: tuple[Lesson, ...], split: Split, rng: Random) -> Iterator[Exercise]:
    """Exercises without end, mixed as the lessons' shares say."""
    shares = [lesson.share for lesson in lessons]
    while True:
        (lesson,) = rng.choices(lessons, shares)
        yield draw(lesson.skill, split, lesson.language, lesson.style, rng)


def prompt(question: Words) -> Words:
    """The words a model reads before it answers."""
    return (BOS, "Q", *question, "=")


def reply(answer: Words) -> Words:
    """The words a right answer consists of: the end token belongs to it."""
    return (*answer, EOS)
