from itertools import combinations, islice
from random import Random

import pytest

from evomerge.zoo import evals
from evomerge.zoo.language import (
    BOS,
    CLOSED,
    DICTIONARY,
    DIGITS,
    EOS,
    FIRST_WORD_OF_B,
    VOCABULARY,
    WORDS_B,
    Lesson,
    compare,
    copy,
    draw,
    neighbor,
    one_step,
    prompt,
    read,
    reply,
    restyle,
    reverse,
    sort,
    split_of,
    translate,
    two_steps,
)

SKILLS = [copy, neighbor, compare, one_step, two_steps, sort, reverse]
TO_A = {b: a for a, b in DICTIONARY.items()}


def in_a(words):
    return tuple(TO_A.get(word, word) for word in words)


def answer_by_hand(question):
    """The count at the end of a story in language A, worked out from its words alone."""
    value = {word: number for number, word in enumerate(list(DICTIONARY)[:10])}
    start, *changes, _ = " ".join(question).split(" . ")
    count = value[start.split()[2]]
    for change in changes:
        _, verb, number = change.split()
        count += value[number] if verb == "gets" else -value[number]
    return (DIGITS[count],)


def test_no_word_of_one_language_is_a_word_of_the_other():
    assert len(set(VOCABULARY)) == len(VOCABULARY)


def test_language_b_is_the_end_of_the_vocabulary():
    assert VOCABULARY[FIRST_WORD_OF_B:] == WORDS_B


@pytest.mark.parametrize("skill", SKILLS)
@pytest.mark.parametrize("language", ["a", "b", "mixed"])
def test_every_exercise_is_made_of_known_words(skill, language):
    rng = Random(0)
    for _ in range(50):
        exercise = translate(skill(rng), language, rng)
        assert {*prompt(exercise.question), *reply(exercise.answer)} <= set(VOCABULARY)


@pytest.mark.parametrize("skill", [one_step, two_steps])
def test_stories_have_the_answer_that_their_words_say(skill):
    rng = Random(0)
    for _ in range(200):
        story = skill(rng)
        assert story.answer == answer_by_hand(story.question)


def test_a_translation_is_undone_by_the_dictionary():
    rng = Random(0)
    for skill in SKILLS:
        exercise = skill(rng)
        translated = translate(exercise, "b", rng)
        assert in_a(translated.question) == exercise.question
        assert in_a(translated.answer) == exercise.answer


def test_copying_a_translated_question_repeats_the_translated_words():
    rng = Random(0)
    for _ in range(50):
        exercise = translate(copy(rng), "mixed", rng)
        assert exercise.question[1:] == exercise.answer


def test_mixed_text_holds_words_of_both_languages():
    words = {
        word for e in islice(read((Lesson(two_steps, 1, "mixed"),), "train", Random(0)), 50) for word in e.question
    }
    assert words & set(WORDS_B)
    assert words & set(DICTIONARY)


def test_the_style_of_an_answer_leaves_the_question_alone():
    exercise = two_steps(Random(0))
    spelled = restyle(exercise, "words")
    assert spelled.question == exercise.question
    assert spelled.answer == (dict(zip(DIGITS, DICTIONARY, strict=False))[exercise.answer[0]],)


@pytest.mark.parametrize("language", ["a", "b", "mixed"])
@pytest.mark.parametrize("split", ["train", "search", "heldout"])
def test_an_open_question_is_only_drawn_for_its_own_split_in_any_language(split, language):
    rng = Random(0)
    for skill in set(SKILLS) - CLOSED:
        assert all(split_of(in_a(draw(skill, split, language, "digits", rng).question)) == split for _ in range(30))


def test_no_question_is_shared_between_the_files_of_any_tasks_or_with_training_in_either_language():
    asked = {part: {in_a(e.question) for task in evals.TASKS for e in evals.items(task, part)} for part in evals.ITEMS}
    lessons = tuple(Lesson(skill, 1, language) for skill in SKILLS for language in ("a", "b", "mixed"))
    trained = {in_a(e.question) for e in islice(read(lessons, "train", Random(0)), 5000)}
    assert all(one.isdisjoint(other) for one, other in combinations([*asked.values(), trained], 2))


def test_a_reply_ends_and_a_prompt_begins_with_its_special_token():
    assert prompt(("copy", "tom"))[0] == BOS
    assert reply(("tom",))[-1] == EOS
