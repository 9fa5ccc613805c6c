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
from evomerge.errors import InputError, WorkFailed
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


def test_the_shipped_zoo_is_number_one():
    assert training.seeds_of(training.SHIPPED) == {"base": 1, "math": 2, "lang": 2}


def test_zoos_differ_in_the_seed_of_every_model_whatever_their_attempts():
    tried = [training.seeds_of(zoo, attempt) for zoo in (1, 101, 102, 999) for attempt in range(training.ATTEMPTS)]
    for name in training.STAGES:
        assert len({seeds[name] for seeds in tried}) == len(tried)


@pytest.fixture
def pretended(monkeypatch):
    """Zoos that are only the names of their models, and whose models learn as told."""

    def pretend(*attempts):
        scores = iter(attempts)
        monkeypatch.setattr(training, "build", dict)
        monkeypatch.setattr(training, "own_skills", lambda models: dict.fromkeys(models, 1.0) | next(scores))

    return pretend


def test_a_zoo_whose_specialist_fails_is_trained_with_the_next_seeds(pretended):
    pretended({"math": 0.5}, {"lang": 0.89}, {}, {})
    models, seeds = training.build_learned(101)
    assert models == seeds == training.seeds_of(101, attempt=2)


def test_a_zoo_that_never_learns_is_failed_work(pretended):
    pretended(*[{"lang": 0.0}] * training.ATTEMPTS)
    with pytest.raises(WorkFailed, match="no zoo 101 learned its skills; choose another --seed"):
        training.build_learned(101)


def test_another_zoo_does_not_overwrite_the_shipped_one(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train_zoo", "--seed", "101"])
    with pytest.raises(SystemExit):
        training.main()
    assert "give --models" in capsys.readouterr().err
