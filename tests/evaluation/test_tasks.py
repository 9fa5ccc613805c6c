"""Finding tasks without running them, and dividing their items."""

import re
from pathlib import Path

import pytest

from evomerge.config.scoring import TasksConfig
from evomerge.errors import InputError
from evomerge.evaluation.tasks import absolute_data_files, find_tasks
from evomerge.search.preparation import prepare_file
from tests.searches import WriteSearch

TRAP = """
from pathlib import Path
Path(__file__).with_name("sprung").touch()
def function(*arguments):
    return "text"
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with a module that leaves a file behind when it is imported."""
    (tmp_path / "trap.py").write_text(TRAP)
    return tmp_path


def find(folder, *names, allow=()):
    return find_tasks(names, TasksConfig(paths=(str(folder),), allow_code=allow))


# Names


def test_tasks_are_found_by_name_in_any_depth(folder):
    deep = folder / "one" / "two"
    deep.mkdir(parents=True)
    (deep / "any_file.yaml").write_text("task: first\n")
    (folder / "other.yml").write_text("task: second\n")
    found = find(folder, "second", "first")
    assert [(name, task.path) for name, task in found.items()] == [
        ("second", folder / "other.yml"),
        ("first", deep / "any_file.yaml"),
    ]


def test_a_path_may_be_one_file(folder):
    (folder / "a.yaml").write_text("task: first\n")
    assert find(folder / "a.yaml", "first")["first"].path == folder / "a.yaml"


def test_an_unknown_task_is_an_input_error_that_names_the_closest(folder):
    (folder / "a.yaml").write_text("task: cross_math\n")
    (folder / "b.yaml").write_text("task: lang\n")
    with pytest.raises(InputError, match=r"'cross_maths'.*did you mean 'cross_math'.*cross_math, lang"):
        find(folder, "cross_maths")


def test_an_unknown_task_is_named_by_the_block_that_asks_for_it(search: WriteSearch) -> None:
    kept, unknown = {"task": "math_a", "retain": 0.9}, {"task": "nope"}
    for key, changes in {
        "objectives[0]": {"objectives": [unknown]},
        "constraints[1]": {"constraints": [kept, {**unknown, "retain": 0.9}]},
        "report[0]": {"constraints": [kept], "report": [unknown]},
    }.items():
        with pytest.raises(InputError, match=re.escape(f"{key}.task is 'nope'")):
            prepare_file(search(changes), [])


def test_a_path_that_does_not_exist_is_an_input_error(folder):
    with pytest.raises(InputError, match=r"tasks.paths.*nowhere.* does not exist"):
        find(folder / "nowhere", "task")


def test_other_yaml_files_are_stepped_over(folder):
    (folder / "a.yaml").write_text("task: first\n")
    (folder / "group.yaml").write_text("group: all\ntask: [first]\n")
    (folder / "list.yaml").write_text("[1, 2]\n")
    (folder / "empty.yaml").write_text("")
    (folder / "notes.txt").write_text("task: notes\n")
    assert set(find(folder, "first")) == {"first"}


def test_a_broken_file_is_an_input_error_with_its_line(folder):
    (folder / "a.yaml").write_text("task: first\nname: [\n")
    with pytest.raises(InputError, match=r"a.yaml: not valid YAML at line \d"):
        find(folder, "first")


def test_a_task_of_lm_eval_is_found_without_its_index(monkeypatch):
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(TaskManager, "__init__", lambda *_, **__: pytest.fail("the index was built"))
    task = find_tasks(["arc_easy"], TasksConfig())["arc_easy"]
    assert task.builtin
    assert task.path.name == "arc_easy.yaml"


def test_a_task_in_tasks_paths_goes_before_lm_eval_s(folder):
    (folder / "a.yaml").write_text("task: arc_easy\n")
    task = find(folder, "arc_easy")["arc_easy"]
    assert task.path == folder / "a.yaml"
    assert not task.builtin


# Groups and tags


def test_groups_and_tags_of_lm_eval_are_found_without_its_index():
    mmlu = find_tasks(["mmlu"], TasksConfig())["mmlu"]
    assert len(mmlu.tasks) == 57
    assert mmlu.by_size == {"acc": True}
    with pytest.raises(InputError, match=r"'mmlu_stem_tasks', a tag on 19 tasks.*name a group"):
        find_tasks(["mmlu_stem_tasks"], TasksConfig())


def test_a_group_passes_its_settings_on_and_the_inner_ones_win(folder):
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text(f"task: {name}\n")
    (folder / "g.yaml").write_text(
        "group: g\nnum_fewshot: 1\ntask:\n  - one\n  - {task: two, num_fewshot: 2}\n"
        "  - {group: written_out, repeats: 3, task: [one]}\naggregate_metric_list: {metric: acc}\n"
    )
    found = find(folder, "g")["g"]
    assert [(task.name, task.overrides) for task in found.tasks] == [
        ("one", {"num_fewshot": 1}),
        ("two", {"num_fewshot": 2}),
        ("one", {"num_fewshot": 1, "repeats": 3}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [one]", r"group 'g' has no aggregate_metric_list"),
        ("task: [ones]\naggregate_metric_list: {metric: acc}", r"group 'g' names 'ones'.*did you mean 'one'"),
        ("task: [g]\naggregate_metric_list: {metric: acc}", r"group 'g' contains itself"),
        ("task: [one]\naggregate_metric_list: {metric: !function trap.function}", r"group 'g' runs code"),
        ("task: [bad]\naggregate_metric_list: {metric: acc}", r"task 'bad' runs code"),
        ("task: [{task: one, unsafe_code: true}]\naggregate_metric_list: {metric: acc}", r"'one' runs code \(unsafe"),
        ("class: a.B\ntask: [one]\naggregate_metric_list: {metric: acc}", r"group 'g' runs code \(class"),
    ],
)
def test_a_group_that_cannot_be_scored_is_an_input_error(text, message, folder):
    (folder / "one.yaml").write_text("task: one\n")
    (folder / "bad.yaml").write_text("task: bad\ndoc_to_text: !function trap.function\n")
    (folder / "g.yaml").write_text(f"group: g\n{text}\n")
    with pytest.raises(InputError, match=message):
        find(folder, "g")
    assert not (folder / "sprung").exists()


# Code

CODE = {
    "a value": "doc_to_text: !function trap.function",
    "a metric": "metric_list:\n  - metric: !function trap.function",
    "a key": "metadata: {!function trap.function : 1}",
    "a set": "metadata: !!set {!function trap.function}",
    "a pair": "metadata: !!pairs [one: !function trap.function]",
    "an overridden value": "doc_to_text: !function trap.function\ndoc_to_text: plain",
    "a merged mapping": "metadata:\n  <<: {one: !function trap.function}\n  one: 1",
    "a class": "class: !function trap.function",
    "a class by name": "class: trap.Task",
    "unsafe code": "unsafe_code: true",
}


@pytest.mark.parametrize("how", CODE)
def test_code_is_refused_unless_allowed_and_never_runs(how, folder):
    (folder / "a.yaml").write_text(f"task: mine\n{CODE[how]}\n")
    with pytest.raises(InputError, match=r"a.yaml: task 'mine' runs code \(.*add 'mine' to tasks.allow_code"):
        find(folder, "mine")
    with pytest.raises(InputError, match="runs code"):
        find(folder, "mine", allow=("other",))
    assert find(folder, "mine", allow=("mine",))["mine"].code
    assert not (folder / "sprung").exists()


def test_the_trap_would_have_sprung(folder):
    from lm_eval.tasks._yaml_loader import load_yaml

    for name, text in CODE.items():
        if "trap.function" in text:
            (folder / "sprung").unlink(missing_ok=True)
            (folder / "a.yaml").write_text(text)
            (folder / "trap.py").write_text(TRAP + f"# {name}\n")
            load_yaml(folder / "a.yaml")
            assert (folder / "sprung").exists(), name


def test_code_in_an_included_file_counts_even_where_it_is_overridden(folder):
    (folder / "shared").mkdir()
    (folder / "shared" / "base.yaml").write_text("doc_to_text: !function trap.function\n")
    (folder / "middle.yaml").write_text("include: shared/base.yaml\n")
    (folder / "a.yaml").write_text("task: mine\ninclude: [middle.yaml]\ndoc_to_text: plain\n")
    with pytest.raises(InputError, match=r"runs code \(!function trap.function\)"):
        find(folder, "mine")


def test_code_of_other_tasks_does_not_matter(folder):
    (folder / "a.yaml").write_text("task: mine\n")
    (folder / "b.yaml").write_text("task: other\ndoc_to_text: !function trap.function\n")
    assert find(folder, "mine")["mine"].code == ()
    assert not (folder / "sprung").exists()


def test_tags_of_python_are_not_read(folder):
    (folder / "a.yaml").write_text("task: mine\nname: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(InputError, match=r"a.yaml: not valid YAML"):
        find(folder, "mine", allow=("mine",))


def test_functions_that_lm_eval_ships_are_trusted_but_unsafe_code_is_not():
    assert find_tasks(["gsm8k_platinum"], TasksConfig())["gsm8k_platinum"].builtin
    hellaswag = find_tasks(["hellaswag"], TasksConfig())["hellaswag"]
    assert hellaswag.code == ("!function utils.process_docs",)
    with pytest.raises(InputError, match=r"task 'humaneval' runs code \(unsafe_code\)"):
        find_tasks(["humaneval"], TasksConfig())


# Includes


def test_the_name_may_come_from_an_include_and_the_file_s_own_keys_win(folder):
    (folder / "_base.yaml").write_text("task: shared_name\n")
    (folder / "a.yaml").write_text("include: _base.yaml\n")
    (folder / "b.yaml").write_text("include: _base.yaml\ntask: own_name\n")
    assert find(folder / "a.yaml", "shared_name")["shared_name"].path == folder / "a.yaml"
    assert find(folder, "own_name")["own_name"].path == folder / "b.yaml"


def test_files_that_include_each_other_are_an_input_error(folder):
    (folder / "a.yaml").write_text("task: first\ninclude: b.yaml\n")
    (folder / "b.yaml").write_text("include: a.yaml\n")
    with pytest.raises(InputError, match=r"a.yaml: includes itself by way of .*b.yaml"):
        find(folder, "first")


def test_a_missing_include_is_an_input_error(folder):
    (folder / "a.yaml").write_text("task: first\ninclude: nowhere.yaml\n")
    with pytest.raises(InputError, match=r"nowhere.yaml.*a.yaml.*cannot be read"):
        find(folder, "first")


# Data files


def test_relative_data_files_become_absolute_and_the_config_is_left_alone(folder):
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_text("{}\n")
    content = {"task": "t", "dataset_kwargs": {"data_files": {"x": "a.jsonl", "y": ["b.jsonl"]}, "field": "rows"}}
    found = absolute_data_files(content, folder)
    a, b = str(folder / "a.jsonl"), str(folder / "b.jsonl")
    assert found["dataset_kwargs"] == {"data_files": {"x": a, "y": [b]}, "field": "rows"}
    assert content["dataset_kwargs"]["data_files"]["x"] == "a.jsonl"
    assert absolute_data_files({"dataset_kwargs": {"data_files": a}}, Path("/"))["dataset_kwargs"]["data_files"] == a


def test_a_missing_data_file_is_an_input_error_and_an_address_is_not(folder):
    with pytest.raises(InputError, match=r"data file gone.jsonl of task 't' is missing"):
        absolute_data_files({"task": "t", "dataset_kwargs": {"data_files": {"x": "gone.jsonl"}}}, folder)
    address = {"task": "t", "dataset_kwargs": {"data_files": {"x": "hf://datasets/owner/name/x.jsonl"}}}
    assert absolute_data_files(address, folder) == address


@pytest.mark.parametrize("content", [{}, {"dataset_kwargs": None}, {"dataset_kwargs": {"field": "rows"}}])
def test_a_task_without_data_files_stays_as_it_is(content, folder):
    assert absolute_data_files(content, folder) == content


def write(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}\n")


def made(files, folder, data_root=None):
    content = {"task": "t", "dataset_path": "json", "dataset_kwargs": {"data_files": {"x": files}}}
    return absolute_data_files(content, folder, data_root)["dataset_kwargs"]["data_files"]["x"]


def test_a_pattern_names_the_files_that_it_matches_in_order(folder):
    write(*(folder / "data" / f"part-{n}.jsonl" for n in (2, 0, 1)), folder / "data" / "deep" / "part-3.jsonl")
    parts = [str(folder / "data" / f"part-{n}.jsonl") for n in range(3)]
    assert made("data/part-*.jsonl", folder) == parts
    assert made(["data/part-[01].jsonl", "data/part-2.jsonl"], folder) == parts
    assert made("data/**/part-3.jsonl", folder) == [str(folder / "data" / "deep" / "part-3.jsonl")]


def test_patterns_read_what_datasets_reads_for_them(folder, monkeypatch):
    from datasets.data_files import resolve_pattern

    write(*(folder / "data" / name for name in ("b.jsonl", "a.jsonl", "a1.jsonl", "deep/a.jsonl")))
    monkeypatch.chdir(folder)
    for pattern in ("data/*.jsonl", "data/a*.jsonl", "data/**/a.jsonl", "data/[ab].jsonl", "data/?.jsonl"):
        assert sorted(made(pattern, folder)) == sorted(resolve_pattern(pattern, str(folder)))


def test_a_file_is_looked_for_beside_the_yaml_first_and_then_where_the_command_is_given(folder, tmp_path, monkeypatch):
    here, root = tmp_path / "here", tmp_path / "root"
    write(here / "a.jsonl", root / "a.jsonl", root / "b.jsonl", folder / "a.jsonl")
    monkeypatch.chdir(here)
    assert made("a.jsonl", folder) == str(folder / "a.jsonl")
    assert made("a.jsonl", tmp_path / "nowhere") == str(here / "a.jsonl")
    assert made("b.jsonl", folder, str(root)) == str(root / "b.jsonl")
    with pytest.raises(InputError, match=rf"data file b.jsonl .* is missing \(looked for in {folder} and {here}\)"):
        made("b.jsonl", folder)


def test_data_files_lie_in_the_data_dir_where_there_is_one(folder):
    write(folder / "data" / "a.jsonl")
    kwargs = {"data_dir": "data", "data_files": "a.jsonl"}
    found = absolute_data_files({"task": "t", "dataset_path": "json", "dataset_kwargs": kwargs}, folder)
    assert found["dataset_kwargs"] == {
        "data_dir": str(folder / "data"),
        "data_files": str(folder / "data" / "a.jsonl"),
    }


def test_files_of_a_data_set_with_a_name_are_its_own_matter(folder):
    content = {"dataset_path": "owner/name", "dataset_kwargs": {"data_files": "a.jsonl"}}
    assert absolute_data_files(content, folder) == content


def test_a_loader_that_opens_pickles_must_be_allowed(folder):
    (folder / "t.yaml").write_text("task: t\ndataset_path: pandas\n")
    with pytest.raises(InputError, match="dataset_path pandas, which opens pickles"):
        find(folder, "t")
