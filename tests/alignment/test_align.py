"""A permuted copy comes back exactly, and an aligned model computes what it did."""

import json
import shutil
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from evomerge import zoo
from evomerge.alignment.align import align
from evomerge.alignment.matching import assigned, assigned_heads
from evomerge.errors import InputError
from evomerge.merging.sources.weights import RECIPE
from evomerge.recipe import Provenance, Recipe, Source, load
from evomerge.seen import SIZE, encoded
from tests.architectures import family
from tests.bad_input import Refuses
from tests.commands import evomerge
from tests.models import shuffled
from tests.searches import EVALS

KINDS = ("llama", "qwen2", "gemma2")  # groups of heads; biases; a tied head and more norms
IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family(request.param, tmp_path_factory.mktemp(request.param), ("base",), layers=2)["base"]


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()(input_ids=IDS).logits


def test_a_shuffled_copy_computes_the_same_and_comes_back_exactly(base: Path, tmp_path: Path) -> None:
    copy = shuffled(base, tmp_path / "copy", seed=1)
    torch.testing.assert_close(logits(copy), logits(base), rtol=1e-3, atol=1e-5)  # norms are computed in float32
    found = align(str(copy), str(base), tmp_path / "out")
    assert found.before > 0.5
    assert found.after == 0.0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", base))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_noisy_copy_comes_back_too_and_another_model_comes_closer(tmp_path: Path) -> None:
    models = family("llama", tmp_path / "models", ("base", "other"), layers=2)
    copy = shuffled(models["other"], tmp_path / "copy", seed=2)
    before = align(str(models["other"]), str(models["base"]), tmp_path / "near")
    found = align(str(copy), str(models["base"]), tmp_path / "out")
    assert found.after < found.before
    assert found.after == pytest.approx(before.after, abs=0.02)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(copy), rtol=1e-3, atol=1e-5)


def test_activations_bring_a_shuffled_copy_back(tmp_path: Path) -> None:
    base, lines = zoo.path("base"), (EVALS / "base_qa" / "search.jsonl").read_text().splitlines()[:40]
    copy = shuffled(base, tmp_path / "copy", seed=3)
    items = [json.loads(line) for line in lines]
    texts = [f"<bos> Q {item['question']} =\t {item['answer']} <eos>" for item in items]
    found = align(str(copy), str(base), tmp_path / "out", "activations", texts)
    assert found.after == 0.0
    assert found.barriers is not None
    before, after = found.barriers
    assert before.height > 0.5
    assert after.height == pytest.approx(0.0, abs=1e-6)
    assert before.ends == pytest.approx(after.ends, rel=1e-5)


def test_what_a_search_saw_goes_along_and_the_fingerprint_does_not(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    seen = frozenset({b"x" * SIZE})
    noted = Recipe(
        merge_method="linear",
        models=(Source(model="first", parameters={"weight": 1.0}),),
        evomerge=Provenance(fingerprint="0" * 16, seen=encoded(seen)),
    )
    model = shutil.copytree(tiny_models["first"], tmp_path / "model")
    (model / RECIPE).write_text(noted.to_yaml())
    align(str(model), str(tiny_models["base"]), tmp_path / "out")
    found = load(tmp_path / "out" / RECIPE).evomerge
    assert (found.digests, found.fingerprint) == (seen, None)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_the_assignment_of_heads_is_the_best_of_all(seed: int, groups: int, per_group: int) -> None:
    random = np.random.default_rng(seed)
    queries = random.normal(size=(groups * per_group,) * 2)
    keys = random.normal(size=(groups, groups))
    found = assigned_heads(queries, keys, per_group)

    def value(heads: Any) -> float:
        of_groups = np.asarray(heads)[::per_group] // per_group
        return float(queries[np.arange(len(heads)), heads].sum() + keys[np.arange(groups), of_groups].sum())

    best = max(
        value([group * per_group + place for group, places in zip(order, within, strict=True) for place in places])
        for order in permutations(range(groups))
        for within in product(list(permutations(range(per_group))), repeat=groups)
    )
    assert value(found) == pytest.approx(best)
    assert sorted(found.tolist()) == list(range(groups * per_group))


def test_an_assignment_takes_every_place_once() -> None:
    assert sorted(assigned(np.random.default_rng(0).normal(size=(7, 7))).tolist()) == list(range(7))


def test_what_cannot_be_aligned_is_refused_and_nothing_is_written(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    other = family("llama", tmp_path / "other", ("base",), layers=2)["base"]
    phi = family("phi3", tmp_path / "phi", ("base", "second"), layers=2)
    cases = [
        (other, tiny_models["base"], "weights", "has another shape than"),
        (phi["second"], phi["base"], "weights", "so a phi3 model cannot be aligned"),
        (tiny_models["first"], tiny_models["base"], "activations", "--texts FILE"),
        (tiny_models["first"], tiny_models["base"], "wieghts", "did you mean 'weights'?"),
    ]
    with pytest.raises(InputError, match="no text has a token that counts"):
        align(str(tiny_models["first"]), str(tiny_models["base"]), tmp_path / "out", texts=["one\t"])
    assert not (tmp_path / "out").exists()
    for model, target, by, message in cases:
        with pytest.raises(InputError, match=message):
            align(str(model), str(target), tmp_path / "out", by)
        assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_brought(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    copy = shuffled(tiny_models["first"], tmp_path / "copy", seed=4)
    (tmp_path / "texts.txt").write_text("one plus two\n\nask base_qa\n")
    arguments = ["--to", tiny_models["base"], "--texts", tmp_path / "texts.txt"]
    document = json.loads(evomerge("align", copy, tmp_path / "out", *arguments, "--json"))
    shown = evomerge("align", copy, tmp_path / "again", *arguments)
    assert f"{document['before']:.3f}" in shown
    assert f"{document['barriers'][1]['middle']:.3f}" in shown
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert written[0] == written[1]


def test_a_file_without_texts_is_refused(tmp_path: Path, refuses: Refuses) -> None:
    (tmp_path / "texts.txt").write_text(" \n\n")
    says = ("texts.txt: holds no text; expected one text a line",)
    refuses("align", "zoo:math", tmp_path / "out", "--to", "zoo:base", "--texts", tmp_path / "texts.txt", says=says)
