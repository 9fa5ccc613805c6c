"""Adapters that are kept as factors: the merges and slopes of expanded ones wherever sources live, in less memory."""

import itertools

import pytest
import torch

from evomerge.errors import InputError
from evomerge.events import unheard
from evomerge.export import adapter, checkpoint
from evomerge.merging.methods import METHODS
from evomerge.merging.resident.models import ResidentModels
from evomerge.merging.resident.sources import Choice, FromFactors, choose, resolve
from evomerge.merging.sources.models import find_models
from evomerge.merging.sources.references import ModelSource
from evomerge.merging.streamed.merge import StreamedMerge
from evomerge.recipe import Recipe, Source
from evomerge.runs import directory as runs
from evomerge.workers.memory import LiveBytes
from tests.commands import content
from tests.merging.resident.test_models import recipe
from tests.models import UNMEASURED, load_models, models, write_adapter

Adapted = dict[str, ModelSource]


@pytest.fixture(scope="module")
def adapted(tiny_models, tmp_path_factory) -> Adapted:
    """A base, two LoRAs of it, and a LoRA of another model."""
    root, base = tmp_path_factory.mktemp("adapters"), tiny_models["base"]
    first = write_adapter(root / "first", base, 1, norm=True)
    second = write_adapter(root / "second", base, 2, dtype=torch.float32, use_rslora=True, alpha_pattern={"q_proj": 7})
    third = write_adapter(root / "third", base, 3, rank=7, dtype=torch.float16)
    return {
        "base": ModelSource(base),
        "first": ModelSource(base, first),
        "second": ModelSource(base, second),
        "third": ModelSource(tiny_models["first"], third),
    }


def held(adapted: Adapted, where: str, form: str, dtype: str = "bfloat16", **more: object) -> ResidentModels:
    base = next(iter(adapted.values())).folder
    return load_models(adapted, base, "cpu", dtype, sources=where, adapters=form, **{"fields": "made"} | more)


@pytest.mark.parametrize("form", ["expanded", "factors"])
def test_what_was_scored_is_what_is_written(form, adapted, tmp_path):
    base = str(adapted["base"])
    sources = tuple(
        Source(model=str(adapted[name]), parameters={"weight": 0.4, "density": 0.7}) for name in ("first", "second")
    )
    merge = Recipe(merge_method="dare_ties", base_model=base, models=sources, dtype="bfloat16")
    named = {str(source): source for source in adapted.values()}
    scored = held(named, "host", form).materialize(merge)
    assert checkpoint.merge(merge, tmp_path / "out", "recipe.yaml")[0] == scored


@pytest.fixture(scope="module")
def held_in_three_ways(adapted) -> list[ResidentModels]:
    """Expanded on the device, and as factors on the device and on the disk."""
    ways = ("device", "expanded"), ("device", "factors"), ("disk", "factors")
    return [held(adapted, where, form, "float32") for where, form in ways]


@pytest.mark.parametrize("method", [name for name in UNMEASURED if METHODS[name].slopes])
def test_slopes_are_those_of_expanded_adapters(method, held_in_three_ways):
    totals = []
    for resident in held_in_three_ways:
        resident.materialize(recipe(method))
        with resident.following(METHODS[method].slopes) as followed:
            resident.candidate(torch.arange(3, 12)[None]).logits.square().mean().backward()
        totals.append(followed.totals())
    assert totals[0]
    assert totals[0] == totals[1] == totals[2]


def test_a_view_takes_layers_of_factors_as_they_are(adapted):
    path = [("first", 0), ("base", 1), ("first", 0), ("third", 3)]
    merge = Recipe.model_validate(
        {
            "merge_method": "passthrough",
            "slices": [{"sources": [{"model": model, "layer_range": [layer, layer + 1]}]} for model, layer in path],
        }
    )
    found = {form: held(adapted, "device", form).materialize(merge) for form in ("expanded", "factors")}
    assert found["factors"] == found["expanded"]


def live(adapted: Adapted, form: str, where: str = "device", rehearsal: bool = False) -> int:
    """How many bytes of tensors models take, beside those of one model."""
    with LiveBytes() as counted:
        kept = held(adapted, where, form, rehearsal=rehearsal)
        assert kept.model is not None
        return counted.now


def test_adapters_as_factors_cost_their_factors_and_what_they_store_whole(adapted):
    of_base = {name: source for name, source in adapted.items() if name != "third"}
    only = live({"base": adapted["base"]}, "factors", rehearsal=True)
    files = [models(of_base, adapted["base"].folder)[name].weights for name in ("first", "second")]
    factors = sum(
        4
        * (change.a.shape[0] * change.a.shape[1] + change.b.shape[0] * change.b.shape[1])
        // (2 if change.a.dtype == "BF16" else 1)
        for weights in files
        for name in weights.table
        for change in weights.products(name)
    )
    norm = 4 * 32  # which the first stores whole
    assert live(of_base, "factors", rehearsal=True) - only == factors + norm
    assert live(of_base, "expanded", rehearsal=True) - only > 4 * factors


def test_models_share_tensors_that_an_adapter_leaves_alone(adapted):
    for form, where in itertools.product(("expanded", "factors"), ("device", "host")):
        sources = held(adapted, where, form)._sources
        name = "model.layers.0.mlp.up_proj.weight"
        assert sources["first"][name] is sources["second"][name] is sources["base"][name]
        assert sources["third"][name] is not sources["base"][name]
        assert isinstance(sources["first"]["model.layers.0.self_attn.q_proj.weight"], FromFactors) is (
            form == "factors"
        )


@pytest.mark.parametrize("form", ["expanded", "factors"])
def test_an_adapter_that_makes_weights_infinite_is_refused(form, tiny_models, tmp_path):
    base = tiny_models["base"]
    loud = write_adapter(tmp_path / "loud", base, 1, dtype=torch.float32, lora_alpha=1e42)
    with pytest.raises(InputError, match=r"embed_tokens\.weight holds values that are not finite"):
        held({"base": ModelSource(base), "loud": ModelSource(base, loud)}, "device", form)


def test_auto_keeps_factors_where_expanded_adapters_do_not_fit_or_would_be_copied():
    assert choose(30, 40, 20, device=200, host=500, expanded=60) == Choice("device", "kept", "expanded")
    assert choose(30, 40, 20, device=140, host=500, expanded=60) == Choice("device", "made", "expanded")
    assert choose(30, 40, 20, device=110, host=500, expanded=60) == Choice("device", "kept", "factors")
    assert choose(30, 40, 20, device=60, host=500, expanded=60) == Choice("device", "made", "factors")
    assert choose(30, 40, 20, device=40, host=500, expanded=60) == Choice("host", "made", "factors")
    assert choose(30, 40, 20, device=40, host=20, expanded=60) == Choice("disk", "made", "factors")
    assert choose(30, 40, 20, device=None, host=200, expanded=60) == Choice("host", "kept", "expanded")
    assert choose(30, 40, 20, device=None, host=200, expanded=60, workers=2) == Choice("host", "kept", "factors")
    assert choose(30, 40, 20, device=None, host=50, expanded=60) == Choice("disk", "made", "factors")


def test_what_a_search_file_says_is_taken_and_the_disk_never_expands_by_itself(adapted):
    given, cpu = models(adapted, adapted["base"].folder), torch.device("cpu")
    assert resolve("auto", "auto", "auto", given, "float32", cpu, 1) == Choice("host", "kept", "expanded")
    assert resolve("disk", "auto", "auto", given, "float32", cpu, 1) == Choice("disk", "kept", "factors")
    assert resolve("device", "made", "auto", given, "float32", cpu, 1) == Choice("device", "made", "expanded")
    assert resolve("disk", "made", "expanded", given, "float32", cpu, 1) == Choice("disk", "made", "expanded")


def test_recipes_of_earlier_versions_are_merged_as_those_versions_expanded_adapters(adapted, tmp_path):
    base, tuned = str(adapted["base"]), str(adapted["second"])
    merge = Recipe(
        merge_method="linear",
        models=(Source(model=base, parameters={"weight": 1}), Source(model=tuned, parameters={"weight": 1})),
        dtype="float32",
    )
    readings = list(find_models(base, merge.references).readings())
    prints = []
    for number, reading in enumerate(readings):
        folder = tmp_path / str(number)
        folder.mkdir()
        prints.append(StreamedMerge(merge, reading, "recipe", "cpu", "float32").write(folder, 1 << 30))
    assert prints[0] != prints[1], "the two ways came out alike, so nothing is shown"
    for number, found in enumerate(prints):
        noted = merge.model_copy(update={"evomerge": merge.evomerge.model_copy(update={"fingerprint": found})})
        assert checkpoint.merge(noted, tmp_path / f"out{number}", "recipe.yaml") == (found, True)
        written = adapter.write_adapter(noted, tmp_path / f"lora{number}", "recipe.yaml", 64, base=base)
        assert (written.merged, written.checked) == (found, True)


def test_a_search_over_adapters_is_resumed_with_other_placements_to_the_same_archive(adapted, search, tmp_path):
    tuned = {name: str(adapted[name].adapter) for name in ("first", "second")}
    found = []
    for first, then in (("auto", "auto"), ("expanded", "factors")):
        run = tmp_path / f"{first}-{then}"
        own = {"models": tuned, "optimizer.evaluations": 4, "evaluation.adapters": first}
        runs.start(search(own), run, (), None, unheard)
        changes = [f"evaluation.adapters={then}", *["evaluation.sources=disk"] * (then == "factors")]
        runs.resume(run, ["optimizer.evaluations=8", *changes], None, unheard)
        found.append([(row["id"], row["genome"], row["scores"], row["fingerprint"]) for row in content(run)[0]])
    assert len(found[0]) >= 8
    assert found[0] == found[1]
