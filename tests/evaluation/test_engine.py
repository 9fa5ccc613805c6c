"""The worker with an engine in another process. vLLM is not there in tests: the server is the real one, and what it
drives is a pretended vLLM, which computes with transformers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from evomerge.candidate import Subset
from evomerge.config.files import load
from evomerge.config.search import SearchConfig
from evomerge.errors import InputError, WorkerPoisoned
from evomerge.evaluation import vllm_server
from evomerge.evaluation.engine import check_interpreter
from evomerge.recipe import Recipe, Slice, Source, linear, single
from evomerge.search.preparation import reopen
from evomerge.workers.memory import plan_memory
from evomerge.workers.worker import Worker
from tests.searches import EVALS, small_search

PRETENDED = Path(__file__).parent / "pretended_vllm"
MERGE = linear({"zoo:math": 0.7, "zoo:lang": 0.3})
pytestmark = pytest.mark.slow  # an engine starts in a process of its own, which imports torch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a task of written answers, an interpreter whose environment has the pretended vLLM, and how that behaves."""
    folder = tmp_path_factory.mktemp("engine")
    rows = (EVALS / "math_a_words" / "search.jsonl").read_text().splitlines()[:24]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    task = {
        "task": "writing",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "<bos> Q {{question}} =",
        "doc_to_target": "{{answer}}",
        "repeats": 2,
        "generation_kwargs": {"until": ["."], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "writing.yaml").write_text(yaml.safe_dump(task))
    (folder / "behavior").write_text("good")
    program = (
        f"import runpy, sys; sys.path.insert(0, '{PRETENDED}'); del sys.argv[:2]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = f'#!/bin/sh\nexport PRETENDED={folder}/behavior\nexec {sys.executable} -c "{program}" "$@"\n'
    (folder / "python").write_text(script)
    (folder / "python").chmod(0o755)
    return folder


def config(folder, backend="vllm", **evaluation):
    return SearchConfig.model_validate(
        small_search(
            objectives=[{"task": "writing", "metric": "exact_match"}, {"task": "math_a"}],
            tasks={"paths": [str(folder), str(EVALS)]},
            items={"search": 12, "heldout": 12},
            evaluation={
                "device": "cpu",
                "dtype": "float32",
                "batch_size": 5,
                "backend": backend,
                "vllm": {"python": str(folder / "python"), "cache_gib": 0.5},
                **evaluation,
            },
        )
    )


@pytest.fixture(scope="module")
def workers(folder):
    """One with the engine, one without."""
    return Worker(config(folder)), Worker(config(folder, "hf"))


def results(worker, recipe, subset=None):
    """What a candidate got, without the time that it took, and the texts that it wrote."""
    found = worker.evaluate(recipe, "search", subset)
    texts = [instance.resps for instance in worker._harness._splits["search"].whole.generations]
    return (found.scores, found.outcomes, found.fingerprint, found.error), texts


def test_texts_scores_and_fingerprints_are_those_of_transformers_for_one_candidate_after_another(workers):
    recipes = [single("zoo:math"), single("zoo:lang"), MERGE, single("zoo:math")]
    with_engine, without = ([results(worker, recipe) for recipe in recipes] for worker in workers)
    assert with_engine == without
    assert with_engine[0] == with_engine[3]
    texts = [texts for _, texts in with_engine]
    assert texts[0] != texts[1] != texts[2]


def test_subsets_are_written_alike(workers):
    with_engine, without = (results(worker, MERGE, Subset(0, 0.5))[0] for worker in workers)
    assert with_engine == without
    assert with_engine[1] != results(workers[0], MERGE)[0][1]


def test_a_recipe_of_other_layers_is_refused(workers):
    layers = [Slice(sources=[Source(model="zoo:base", layer_range=(n, n + 1))]) for n in (1, 0, 2, 3, 4, 5)]
    with pytest.raises(InputError, match=r"evaluation\.backend is vllm, .*use hf"):
        workers[0].evaluate(Recipe(merge_method="passthrough", slices=layers), "search")


def test_an_engine_that_keeps_another_candidate_s_weights_is_found_out(workers, folder):
    results(workers[0], single("zoo:math"))
    (folder / "behavior").write_text("stale")
    (_, _, _, error), _ = results(workers[0], MERGE)
    (folder / "behavior").write_text("good")
    assert "vLLM's log-likelihood of a text that it wrote is" in error
    assert results(workers[0], MERGE) == results(workers[1], MERGE)


def test_a_worker_whose_engine_has_failed_asks_to_be_made_anew(workers, folder):
    (folder / "behavior").write_text("broken")
    for _ in range(2):
        with pytest.raises(WorkerPoisoned, match="vLLM has ended"):
            workers[0].evaluate(MERGE, "search")
    assert workers[0]._harness._writer._process.poll() is not None


def test_an_engine_that_cannot_start_is_an_input_error_with_its_last_words(folder, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\necho starting >&2; echo 'no such GPU' >&2; exit 1\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(InputError, match=r"evaluation\.vllm: .*no such GPU.*backend hf"):
        Worker(config(folder, vllm={"python": str(tmp_path / "python")}))


def test_the_server_ends_with_its_input():
    ended = subprocess.run(
        [sys.executable, "-I", vllm_server.__file__], stdin=subprocess.DEVNULL, timeout=20, check=True
    )
    assert ended.returncode == 0


def test_an_interpreter_is_looked_at_before_it_is_needed(folder, tmp_path):
    check_interpreter(str(folder / "python"))
    with pytest.raises(InputError, match="has no vLLM"):
        check_interpreter(sys.executable)
    with pytest.raises(InputError, match=r"cannot be run \(No such file or directory\)"):
        check_interpreter(str(tmp_path / "python"))


def test_an_interpreter_s_path_is_absolute_and_its_links_are_not_followed(folder, tmp_path):
    os.symlink(folder / "python", tmp_path / "linked")
    file = tmp_path / "search.yaml"
    file.write_text(config(folder, vllm={"python": "linked"}).to_yaml())
    found = load(file)
    assert found.evaluation.vllm.python == str(tmp_path / "linked")


def test_memory_is_counted_for_the_engine_too(folder):
    search = config(folder, compile=False)
    plan = plan_memory(search, reopen(search).space)
    assert plan.total - plan.engine > plan.models
    assert plan.engine > 2**29
