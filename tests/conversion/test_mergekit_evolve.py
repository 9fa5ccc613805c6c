"""What mergekit-evolve searches, evomerge searches after a conversion; and what it does not is said."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.evo.config import EvolMergeConfiguration
from mergekit.evo.genome import METHOD_PARAM_MAPS, ModelGenome, ModelGenomeDefinition

from evomerge import zoo
from evomerge.config.files import load
from evomerge.conversion import mergekit_evolve
from evomerge.conversion.convert import Converted, convert
from evomerge.conversion.options import Options
from evomerge.recipe import resolve_setting
from evomerge.search.preparation import prepare
from tests.bad_input import Refuses
from tests.commands import evomerge
from tests.searches import EVALS, put

BASE_AMONG_MODELS: dict[str, Any] = {
    "genome": {
        "models": ["lab/seed-3b", "lab/law-3b", "lab/verse-3b"],
        "merge_method": "task_arithmetic",
        "base_model": "lab/seed-3b",
        "tokenizer_source": "base",
        "layer_granularity": 7,
        "allow_negative_weights": True,
    },
    "tasks": [{"name": "statutes", "weight": 0.25}, {"name": "sonnets", "weight": 0.75}],
}
SPARSE: dict[str, Any] = {
    "notes": "kept by its author",
    "genome": {
        "models": ["lab/law-3b", "lab/verse-3b"],
        "merge_method": "dare_ties",
        "base_model": "lab/seed-3b",
        "layer_granularity": 14,
        "normalize": False,
        "filters": ["q_proj", "down_proj"],
    },
    "tasks": ["sciq", {"name": "lambada", "metric": "perplexity,none", "weight": -0.02}],
    "limit": 300,
    "shuffle": True,
    "apply_chat_template": False,
    "random_init": True,
}
AVERAGE: dict[str, Any] = {
    "genome": {"models": ["lab/one", "lab/two", "lab/three"], "merge_method": "linear", "layer_granularity": 2},
    "tasks": [{"name": "sums", "metric": "exact_match,strict-match"}],
    "limit": 60,
    "num_fewshot": 3,
}
BETWEEN_TWO: dict[str, Any] = {
    "genome": {"models": ["lab/one", "lab/two", "lab/three"], "merge_method": "slerp", "smooth": True},
    "tasks": [{"name": "sums", "weight": 1.0, "metric": "acc_norm,none"}],
}
ZOO: dict[str, Any] = {
    "genome": {
        "models": ["zoo:math", "zoo:lang"],
        "merge_method": "ties",
        "base_model": "zoo:base",
        "layer_granularity": 2,
        "filters": ["self_attn", "mlp"],
    },
    "tasks": ["base_qa", {"name": "math_a", "weight": 2}],
    "limit": 24,
    "apply_chat_template": False,
}


def converted(document: Any, folder: Path, **options: Any) -> tuple[dict[str, Any], Converted]:
    """The content of the search file of a config, and the conversion."""
    path = folder / "evolve.yml"
    path.write_text(yaml.safe_dump(document))
    made = convert(path, folder, Options(**options))
    return yaml.safe_load(made.text), made


def test_the_text_is_the_config_that_was_checked(tmp_path: Path) -> None:
    for document in (BASE_AMONG_MODELS, SPARSE, AVERAGE, BETWEEN_TWO, ZOO):
        _, made = converted(document, tmp_path)
        path = tmp_path / "search.yaml"
        path.write_text(made.text)
        assert load(path).model_dump(exclude={"tasks"}) == made.config.model_dump(exclude={"tasks"})


def test_a_base_among_the_models_is_the_base_alone_and_counts_in_the_start(tmp_path: Path) -> None:
    search, made = converted(BASE_AMONG_MODELS, tmp_path)
    assert search["base"] == "lab/seed-3b"
    assert search["models"] == {"law-3b": "lab/law-3b", "verse-3b": "lab/verse-3b"}
    assert search["space"]["layer_granularity"] == 7
    assert search["space"]["normalize"] is False
    weight = search["space"]["weight"]
    assert weight["low"] == -weight["high"] < 0
    assert math.isclose(weight["start"], 1 / 3, rel_tol=1e-5)
    assert [(each.weight, each.goal) for each in made.config.objectives] == [(0.25, "maximize"), (0.75, "maximize")]
    assert search["evaluation"]["apply_chat_template"] is True
    assert search["evaluation"]["fewshot_as_multiturn"] is True
    assert made.lost == []


def test_filters_densities_and_negative_weights_are_translated(tmp_path: Path) -> None:
    search, made = converted(SPARSE, tmp_path, max_fevals=500, sigma=0.3)
    space = search["space"]
    assert (space["method"], space["filters"], space["rescale"]) == ("dare_ties", ["q_proj", "down_proj"], "l1")
    assert space["normalize"] is False
    assert (space["weight"]["low"], space["weight"]["start"], space["weight"]["step"]) == (0, 0.5, 0.3)
    assert (space["density"]["high"], space["density"]["start"]) == (1, 1)
    assert search["objectives"] == [
        {"task": "sciq", "goal": "maximize"},
        {"task": "lambada", "metric": "perplexity", "goal": "minimize", "weight": 0.02},
    ]
    assert search["items"] == {"search": 300}
    assert search["evaluation"]["apply_chat_template"] is False
    assert search["optimizer"] == {"name": "cma_es", "evaluations": 500, "ranking": "weighted_sum"}
    assert [sentence.split()[0] for sentence in made.lost] == ["notes", "random_init:"]


def test_normalize_that_is_not_set_is_what_mergekit_evolve_takes(tmp_path: Path) -> None:
    for method, normalized in (("ties", True), ("dare_ties", True), ("task_arithmetic", False)):
        document = {**SPARSE, "genome": {**SPARSE["genome"], "merge_method": method, "normalize": None}}
        assert converted(document, tmp_path)[0]["space"]["normalize"] is normalized
    linear = {"models": ["lab/one", "lab/two"], "merge_method": "linear", "base_model": "lab/zero"}
    assert converted({**AVERAGE, "genome": linear}, tmp_path)[0]["space"]["normalize"] is True


def test_an_average_without_a_base_is_searched_around_its_first_model(tmp_path: Path) -> None:
    search, made = converted(AVERAGE, tmp_path)
    assert (search["base"], list(search["models"].values())) == ("lab/one", ["lab/two", "lab/three"])
    assert search["space"]["method"] == "task_arithmetic"
    assert "lab/one; `evomerge convert --base MODEL` takes another" in " ".join(made.text.replace("\n#", "").split())
    assert search["objectives"] == [
        {"task": "sums", "metric": "exact_match", "filter": "strict-match", "goal": "maximize"}
    ]
    assert (search["items"], search["evaluation"]["num_fewshot"]) == ({"search": 60}, 3)


def test_an_average_with_a_base_of_its_own_stays_one(tmp_path: Path) -> None:
    search, _ = converted(AVERAGE, tmp_path, base="lab/zero")
    assert (search["base"], len(search["models"]), search["space"]["method"]) == ("lab/zero", 3, "linear")


def test_the_average_around_a_model_is_the_same_merge(tmp_path: Path) -> None:
    """With the weights at which a search starts, on numbers in the place of tensors."""
    search, _ = converted(AVERAGE, tmp_path)
    numbers = {"lab/one": 3.0, "lab/two": -1.0, "lab/three": 10.0}
    base, start = numbers[search["base"]], search["space"]["weight"]["start"]
    merged = base + sum(start * (numbers[model] - base) for model in search["models"].values())
    assert math.isclose(merged, sum(numbers.values()) / 3, rel_tol=1e-5)


def test_slerp_between_two_of_three_chooses_them_by_genes(tmp_path: Path) -> None:
    search, made = converted(BETWEEN_TWO, tmp_path)
    assert search["space"] == {"method": "slerp", "parameters": {"slerp": {"t": {"start": 0.5}}}}
    assert search["optimizer"]["name"] == "cat_cma"
    assert any("chooses two of the models" in sentence for sentence in made.lost)


def test_the_options_of_the_command_line_are_translated_or_named(tmp_path: Path) -> None:
    search, made = converted(
        ZOO,
        tmp_path,
        population=12,
        strategy="buffered",
        num_gpus=3,
        seed=5,
        batch_size=16,
        task_paths=("tasks",),
        timeout=60.0,
        load_in_4bit=True,
        trust_remote_code=True,
        unneeded=("--wandb",),
    )
    assert search["optimizer"]["population"] == 12
    assert search["workers"] == {"pool": "ray", "count": 3, "num_gpus": 1}
    assert (search["seed"], search["evaluation"]["batch_size"]) == (5, 16)
    lost = " ".join(made.lost)
    assert all(option in lost for option in ("--timeout", "--load-in-4bit", "--trust-remote-code"))
    assert "nothing of --wandb" in made.text
    assert converted(ZOO, tmp_path, strategy="serial")[0]["workers"] == {"pool": "local"}


def test_paths_are_found_from_where_the_search_file_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mergekit's paths start at the working directory, a search file's at its folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("models/law", "tasks"):
        (tmp_path / name).mkdir(parents=True)
    genome = {**ZOO["genome"], "models": ["models/law", "./absent", "lab/verse+models/law"]}
    (tmp_path / "evolve.yml").write_text(yaml.safe_dump({**ZOO, "genome": genome}))
    evomerge("convert", "evolve.yml", "--task-search-path", "tasks", "-o", "searches/new/search.yaml")
    config = load(tmp_path / "searches/new/search.yaml")
    law = str(tmp_path / "models/law")
    assert list(config.models.values()) == [law, str(tmp_path / "absent"), f"lab/verse+{law}"]
    assert config.tasks.paths == (str(tmp_path / "tasks"),)


def test_a_config_over_models_that_are_here_can_start(tmp_path: Path) -> None:
    output = tmp_path / "search.yaml"
    (tmp_path / "evolve.yml").write_text(yaml.safe_dump(ZOO))
    evomerge("convert", tmp_path / "evolve.yml", "--task-search-path", EVALS, "-o", output)
    prepared = prepare(load(output))
    assert {gene.kind for gene in prepared.space.genes} == {"weight", "density"}
    groups = {gene.group for gene in prepared.space.genes}
    assert {"layers_0-1.self_attn", "layers_2-3.mlp", "layers_4-5.rest"} <= groups


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties"])
def test_a_search_starts_at_the_merge_at_which_mergekit_evolve_starts(method: str, tmp_path: Path) -> None:
    genome = {**ZOO["genome"], "merge_method": method}
    paths = {f"zoo:{name}": str(zoo.path(name)) for name in ("base", "math", "lang")}
    definition = ModelGenomeDefinition.model_validate(
        {**genome, "base_model": paths["zoo:base"], "models": [paths[model] for model in genome["models"]]}
    )
    theirs = ModelGenome(definition)
    expected = theirs.genotype_merge_config(theirs.initial_genotype())
    _, made = converted({**ZOO, "genome": genome}, tmp_path, task_paths=(str(EVALS),))
    space = prepare(made.config).space
    ours = space.decode([gene.start for gene in space.genes])
    assert (ours.merge_method, len(ours.slices or ())) == (expected.merge_method, len(expected.slices))
    assert ours.parameters["normalize"] is expected.parameters["normalize"]
    for own, other in zip(ours.slices or (), expected.slices, strict=True):
        for model in genome["models"]:
            (source,) = [each for each in own.sources if each.model == model]
            (their_source,) = [each for each in other.sources if each.model.model.path == paths[model]]
            assert source.layer_range == their_source.layer_range
            for name, conditions in their_source.parameters.items():
                for tensor in ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight", "x.norm"):
                    value = next(each.value for each in conditions if each.filter is None or each.filter in tensor)
                    assert resolve_setting(source.parameters[name], tensor, 0.0, float) == pytest.approx(value)


def test_without_an_output_the_file_is_printed_and_what_is_not_kept_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "evolve.yml"
    path.write_text(yaml.safe_dump(SPARSE))
    printed = evomerge("convert", path)
    assert yaml.safe_load(printed)["base"] == "lab/seed-3b"
    assert "random_init: a search starts at" in capfd.readouterr().err
    assert "# Not kept: random_init" in printed


NAMES = st.text("abcXYZ019_-.é \"'#:", min_size=1, max_size=8)
REFERENCES = st.builds(lambda owner, name: f"lab{owner}/{name}".strip(), NAMES, NAMES)
FINITE = st.floats(-5, 5).filter(bool)


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """Configs of mergekit-evolve, with keys left out now and then."""
    method = draw(st.sampled_from(sorted(METHOD_PARAM_MAPS)))
    models = draw(st.lists(REFERENCES, min_size=2, max_size=4, unique=True))
    optional: dict[str, Any] = {
        "base_model": st.sampled_from(models) | REFERENCES,
        "tokenizer_source": st.sampled_from(["base", "union", models[0]]),
        "layer_granularity": st.integers(-1, 9),
        "normalize": st.none() | st.booleans(),
        "allow_negative_weights": st.booleans(),
        "filters": st.none() | st.lists(NAMES | st.just("*"), max_size=3),
        "smooth": st.booleans(),
    }
    task = st.fixed_dictionaries(
        {"name": NAMES}, optional={"weight": FINITE, "metric": st.sampled_from(["acc,none", "f1", "em,strict"])}
    )
    settings_ = {
        "limit": st.none() | st.integers(-2, 900),
        "num_fewshot": st.none() | st.integers(-1, 9),
        **{key: st.booleans() for key in ("shuffle", "random_init", "apply_chat_template", "fewshot_as_multiturn")},
        "left_over": NAMES,
    }
    return {
        "genome": {"models": models, "merge_method": method, **draw(st.fixed_dictionaries({}, optional=optional))},
        "tasks": draw(st.lists(NAMES | task, min_size=1, max_size=4, unique_by=str)),
        **draw(st.fixed_dictionaries({}, optional=settings_)),
    }


@settings(max_examples=60, deadline=None)
@given(document=documents())
def test_whatever_mergekit_takes_becomes_a_search(document: dict[str, Any], tmp_path_factory: Any) -> None:
    try:
        config = EvolMergeConfiguration.model_validate(document)
    except (ValueError, RuntimeError):
        return
    weights: dict[Any, float] = {}
    for task in config.tasks:
        weights[task.name, task.metric] = weights.get((task.name, task.metric), 0.0) + task.weight
    if not any(weights.values()):
        return
    folder = tmp_path_factory.getbasetemp()
    search, made = converted(document, folder)
    assert len(made.config.objectives) + len(made.config.report) <= len(weights)
    assert search["base"] not in search["models"].values()
    assert {*search["models"].values(), search["base"]} >= set(document["genome"]["models"])


BAD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "an unknown method": (
        {"genome.merge_method": "dare_tie"},
        ("genome.merge_method", "is 'dare_tie'", "did you mean 'dare_ties'?"),
    ),
    "no models": ({"genome.models": []}, ("genome.models is []; give at least one",)),
    "the base alone": ({"genome.models": ["zoo:base"]}, ("genome.models has no model but the base, zoo:base",)),
    "no base": ({"genome.base_model": None}, ("genome.base_model is missing, but merge_method is ties; add it",)),
    "no tasks": ({"tasks": []}, ("tasks is []; give at least one",)),
    "a weight in words": ({"tasks.1.weight": "much"}, ("tasks[1].weight is", '"much"')),
    "weights of 0": ({"tasks": [{"name": "base_qa", "weight": 0}]}, ("tasks have no weight but 0",)),
    "a limit in words": ({"limit": "all"}, ('limit is "all"',)),
    "a model that is none": ({"genome.models.0": {"path": "x"}}, ("genome.models[0].model is required but missing",)),
}


@pytest.mark.parametrize("claim", BAD)
def test_a_config_that_mergekit_evolve_refuses_gets_one_sentence(claim: str, tmp_path: Path, refuses: Refuses) -> None:
    changes, says = BAD[claim]
    document = yaml.safe_load(yaml.safe_dump(ZOO))
    for key, value in changes.items():
        put(document, key, value)
    path = tmp_path / "evolve.yml"
    path.write_text(yaml.safe_dump(document))
    refuses("convert", path, "-o", "search.yaml", says=(f"evomerge: {path}: ", *says))


def test_options_that_no_search_can_have_are_refused(tmp_path: Path, refuses: Refuses) -> None:
    path = tmp_path / "evolve.yml"
    path.write_text(yaml.safe_dump(ZOO))
    refuses("convert", path, "--sigma", 0, says=("--sigma is 0; use a number above 0",))
    refuses("convert", path, "--max-fevals", 0, says=("--max-fevals is 0; use a whole number of at least 1",))
    refuses("convert", path, "--strategy", "swarm", says=("--strategy is 'swarm'; valid names: pool, buffered",))
    refuses("convert", path, "-o", path, says=(f"{path}: exists already; choose another -o",))
    refuses("convert", path, "--task", "sciq", says=("--task sciq", "names its own tasks"))


def test_run_and_check_say_that_such_a_file_can_be_converted(tmp_path: Path, refuses: Refuses) -> None:
    path = tmp_path / "evolve.yml"
    path.write_text(yaml.safe_dump(ZOO))
    for command in ("run", "check"):
        refuses(command, path, says=(f"{path}: this is a config of mergekit-evolve", f"`evomerge convert {path}`"))


def test_other_files_are_not_converted(tmp_path: Path, search_file: Any, refuses: Refuses) -> None:
    refuses("convert", search_file(), says=("this is a search file already",))
    path = tmp_path / "other.yml"
    path.write_text("slices: []\n")
    refuses("convert", path, says=(f"{path}: expected genome", "or merge_method"))


def test_it_knows_the_methods_of_mergekit_evolve() -> None:
    assert set(mergekit_evolve.METHODS) == set(METHOD_PARAM_MAPS)
