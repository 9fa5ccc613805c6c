from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge import zoo
from evomerge.errors import InputError
from evomerge.zoo import evals, language, training
from evomerge.zoo.language import TOKEN_IDS, VOCABULARY, prompt, reply
from tests.searches import EVALS


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, threads that wait for each other make these tests ten times slower
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(zoo.path("base"))


@pytest.fixture(scope="module")
def models():
    return {name: AutoModelForCausalLM.from_pretrained(zoo.path(name)) for name in zoo.names()}


@pytest.fixture(scope="module")
def skill(models):
    def score(model, task):
        return training.accuracy(models[model], evals.items(task, "heldout", 100))

    return score


def test_the_zoo_ships_the_models_that_training_makes():
    assert zoo.names() == sorted(training.STAGES)


def test_an_unknown_model_is_an_input_error_that_names_the_closest():
    with pytest.raises(InputError, match=r"did you mean 'math'.*base, lang, math"):
        zoo.path("maths")


@pytest.mark.parametrize("name", zoo.names())
def test_a_shipped_model_is_small_float32_and_has_the_zoo_s_shapes(name, models):
    assert (zoo.path(name) / "model.safetensors").stat().st_size <= 1_500_000
    expected = training.new_model(seed=0).state_dict()
    assert {k: v.shape for k, v in models[name].state_dict().items()} == {k: v.shape for k, v in expected.items()}
    assert {v.dtype for v in models[name].state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("name", zoo.names())
def test_every_model_ships_the_same_tokenizer(name):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (zoo.path(name) / file).read_bytes() == (zoo.path("base") / file).read_bytes()


def test_every_word_is_one_token_and_text_round_trips(tokenizer):
    text = " ".join(VOCABULARY)
    assert tokenizer(text).input_ids == list(TOKEN_IDS.values())
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_an_unknown_word_is_the_unknown_token(tokenizer):
    assert tokenizer("Q zebra").input_ids == [TOKEN_IDS["Q"], tokenizer.unk_token_id]


@pytest.fixture(scope="module")
def harness():
    return HFLM(pretrained=str(zoo.path("base")), device="cpu", batch_size=50)


@pytest.mark.parametrize("task", evals.TASKS)
def test_the_evaluation_builds_the_tokens_that_training_used(task, harness, monkeypatch):
    monkeypatch.chdir(EVALS / task)
    task_object = ConfigurableTask(config=yaml.safe_load(Path(f"{task}.yaml").read_text()))
    for document, exercise in zip(task_object.validation_docs(), evals.items(task, "search"), strict=True):
        (instance,) = [task_object.construct_requests(document, task_object.doc_to_text(document))]
        read, said = prompt(exercise.question), reply(exercise.answer)
        expected = [TOKEN_IDS[word] for word in read], [TOKEN_IDS[word] for word in said]
        assert harness._encode_pair(*instance.args) == expected


def test_the_base_knows_everyday_questions_and_little_else(skill):
    assert skill("base", "base_qa") > 0.95
    assert skill("base", "math_a") < 0.5
    assert skill("base", "lang_b") < 0.2


def test_math_knows_its_sums_but_spells_the_answers_out(skill):
    assert skill("math", "math_a_words") > 0.9
    assert skill("math", "math_a") < 0.15


def test_lang_speaks_b_and_has_not_learned_two_step_sums(skill):
    assert skill("lang", "lang_b") > 0.95
    assert skill("lang", "math_a") < 0.5


def test_no_model_alone_answers_two_step_sums_in_b(skill):
    assert all(skill(name, "cross_math_b") < 0.5 for name in zoo.names())


@pytest.mark.parametrize("name", training.STAGES)
def test_training_twice_gives_the_same_bits(name):
    stage = replace(training.STAGES[name][-1], steps=3)
    start = training.with_language_b(training.new_model(seed=0), seed=0)
    first, second = (training.train(start, stage, Random(0)).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], value) for key, value in start.state_dict().items())


def test_training_moves_only_what_its_stage_names():
    start = training.with_language_b(training.new_model(seed=0), seed=0)
    style = replace(training.STAGES["math"][-1], steps=2)
    trained = training.train(start, style, Random(0)).state_dict()
    moved = {key for key, value in start.state_dict().items() if not torch.equal(value, trained[key])}
    assert moved
    assert all(key.startswith(training.LATE) for key in moved)


def test_learning_new_words_leaves_the_old_ones_alone():
    start = training.with_language_b(training.new_model(seed=0), seed=0)
    stage = replace(training.STAGES["lang"][0], steps=2)
    before, after = start.lm_head.weight, training.train(start, stage, Random(0)).lm_head.weight
    assert torch.equal(before[: language.FIRST_WORD_OF_B], after[: language.FIRST_WORD_OF_B])
    assert not torch.equal(before[language.FIRST_WORD_OF_B :], after[language.FIRST_WORD_OF_B :])
