"""Layers side by side against a forward pass that is written out layer by layer, with transformers' own layers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from evomerge.errors import InputError
from evomerge.evaluation.likelihoods import PreparedRequests, Request
from evomerge.export import checkpoint
from evomerge.layers import is_layer
from evomerge.merging.resident.gradients import checkpointed
from evomerge.merging.resident.models import ResidentModels
from evomerge.merging.streamed.merge import StreamedMerge
from evomerge.recipe import Blocks, FilteredValue, Provenance, Recipe, Slice, Source
from tests import architectures
from tests.models import load_models, models

WORDS = torch.arange(3, 43).reshape(2, 20)
CPU = torch.device("cpu")
Layer = tuple[str, int]


def path(layers: Sequence[Layer], parallel: Blocks, scale: float = 1.0) -> Recipe:
    """A recipe of layers in any order, some of them side by side; the output of each MLP is scaled."""
    scales = [FilteredValue(filter="mlp.down_proj", value=scale), FilteredValue(value=1.0)]
    slices = tuple(
        Slice(sources=(Source(model=model, layer_range=(layer, layer + 1), parameters={"scale": scales}),))
        for model, layer in layers
    )
    return Recipe(merge_method="passthrough", slices=slices, evomerge=Provenance(parallel=parallel))


def layers_of(model: Any) -> list[Any]:
    return [module for name, module in model.named_modules() if is_layer(name)]


class Written:
    """The forward pass of a path, written out. Masks and position embeddings are those that each layer gets in a model
    of transformers, where they do not depend on the hidden states."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.models = {name: AutoModelForCausalLM.from_pretrained(folder).eval() for name, folder in folders.items()}

    def __call__(self, layers: Sequence[Layer], parallel: Blocks, words: torch.Tensor = WORDS) -> torch.Tensor:
        """The hidden states behind the last layer."""
        hidden = None
        place = 0
        calls = {name: self._calls(model, words) for name, model in self.models.items()}
        while place < len(layers):
            end = next((end for start, end in parallel if start == place), place + 1)
            outputs = []
            for model, layer in layers[place:end]:
                given, named = calls[model][layer]
                first = calls[layers[0][0]][0][0][0] if hidden is None else hidden
                output = layers_of(self.models[model])[layer](first, *given[1:], **named)
                outputs.append(output[0] if isinstance(output, tuple) else output)
            hidden = torch.stack(outputs).mean(0)
            place = end
        assert hidden is not None
        return hidden

    @staticmethod
    def _calls(model: Any, words: torch.Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What each layer of a model is called with."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        handles = [
            layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
            for layer in layers_of(model)
        ]
        model(words, use_cache=False)
        for handle in handles:
            handle.remove()
        return calls


def behind_the_last_layer(model: Any, words: torch.Tensor = WORDS) -> torch.Tensor:
    found: list[Any] = []
    handle = layers_of(model)[-1].register_forward_hook(lambda _, args, output: found.append(output))
    model(words, use_cache=False)
    handle.remove()
    return found[0][0] if isinstance(found[0], tuple) else found[0]


PATHS: dict[str, tuple[list[Layer], Blocks]] = {
    "a block in the middle": ([("base", 0), ("base", 1), ("base", 2), ("base", 3)], ((1, 3),)),
    "blocks at both ends": ([("first", 0), ("base", 1), ("base", 2), ("first", 3)], ((0, 2), (2, 4))),
    "all layers": ([("base", 0), ("first", 1), ("base", 2), ("base", 3)], ((0, 4),)),
    "a loop": ([("base", layer) for layer in (0, 1, 2, 1, 2, 1, 2, 3)], ((1, 3), (3, 5), (5, 7))),
}


@pytest.fixture(scope="module")
def resident(tiny_models: dict[str, Path]) -> ResidentModels:
    return load_models(tiny_models, tiny_models["base"], "cpu", "float32")


@pytest.mark.parametrize("name", PATHS)
@torch.no_grad()
def test_the_layers_of_a_block_read_one_input_and_their_mean_goes_on(
    name: str, resident: ResidentModels, tiny_models: dict[str, Path]
) -> None:
    layers, parallel = PATHS[name]
    resident.materialize(path(layers, parallel))
    written = Written(tiny_models)
    hidden = written(layers, parallel)
    assert torch.allclose(behind_the_last_layer(resident.candidate), hidden, atol=1e-5)
    ends = written.models[layers[-1][0]]
    assert torch.allclose(resident.candidate(WORDS).logits, ends.lm_head(ends.model.norm(hidden)), atol=1e-5)
    one_by_one = written(layers, ())
    assert not torch.allclose(hidden, one_by_one, atol=1e-3)


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
@torch.no_grad()
def test_every_architecture_runs_layers_of_one_and_of_several_kinds_side_by_side(
    architecture: str, tmp_path: Path
) -> None:
    kinds = {"layer_types": ["full_attention", "sliding_attention"] * 2} if "gemma" in architecture else {}
    folders = architectures.family(architecture, tmp_path, ("base", "first"), layers=4, **kinds)
    resident = load_models(folders, folders["base"], "cpu", "float32")
    layers: list[Layer] = [("base", layer) for layer in (0, 1, 2, 1, 2, 3)]
    parallel: Blocks = ((1, 3), (3, 5))
    resident.materialize(path(layers, parallel, 1.0))
    expected = Written(folders)(layers, parallel)
    assert torch.allclose(behind_the_last_layer(resident.candidate), expected, rtol=1e-4, atol=1e-4)
    whole = resident.candidate(WORDS).logits
    begun = resident.candidate(WORDS[:, :11], use_cache=True)
    rest = resident.candidate(WORDS[:, 11:], past_key_values=begun.past_key_values, use_cache=True)
    assert torch.allclose(torch.cat([begun.logits, rest.logits], 1), whole, rtol=1e-3, atol=1e-3)
    assert rest.past_key_values.get_seq_length() == WORDS.shape[1]
    assert len(rest.past_key_values.layers) == len(layers)


@torch.no_grad()
def test_texts_are_written_with_a_cache_as_without_one(resident: ResidentModels) -> None:
    resident.materialize(path(*PATHS["a loop"]))
    wanted = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached = resident.candidate.generate(WORDS, use_cache=True, **wanted)
    assert torch.equal(cached, resident.candidate.generate(WORDS, use_cache=False, **wanted))


@pytest.mark.parametrize("name", PATHS)
def test_packed_rows_score_as_full_rows(name: str, resident: ResidentModels) -> None:
    resident.materialize(path(*PATHS[name]))
    requests = [Request((1, 2, 3, 4, 5, 6, 7, 8 + row), (4, 9 + end, 5), row) for row in range(3) for end in range(3)]
    packed = PreparedRequests(requests, 4, 64, CPU, packed=True)
    assert any(batch.segments is not None for batch in packed.batches)
    alone = PreparedRequests(requests, 4, 64, CPU).run(resident.candidate)
    for mine, other in zip(packed.run(resident.candidate), alone, strict=True):
        assert mine.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), WORDS[:, 1:].flatten())


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("name", PATHS)
def test_scales_have_the_derivatives_of_the_written_pass(
    name: str, again: bool, resident: ResidentModels, tiny_models: dict[str, Path]
) -> None:
    layers, parallel = PATHS[name]
    resident.materialize(path(layers, parallel))
    with resident.following(["scale"]) as followed:
        if again:
            with checkpointed(resident.candidate):
                loss_of(resident.candidate(WORDS, use_cache=False).logits).backward()
        else:
            loss_of(resident.candidate(WORDS, use_cache=False).logits).backward()
    written = Written(tiny_models)
    ends = written.models[layers[-1][0]]
    loss_of(ends.lm_head(ends.model.norm(written(layers, parallel)))).backward()
    totals = followed.totals()
    for model, layer in dict.fromkeys(layers):
        weight = layers_of(written.models[model])[layer].mlp.down_proj.weight
        places = [place for place, pair in enumerate(layers) if pair == (model, layer)]
        found = sum(totals[f"model.layers.{place}.mlp.down_proj.weight", model, "scale"] for place in places)
        assert found == pytest.approx(float((weight.grad * weight.detach()).sum()), rel=1e-3, abs=1e-6)


@torch.no_grad()
def test_candidates_before_and_after_are_none_the_wiser(resident: ResidentModels) -> None:
    plain = path([("base", layer) for layer in range(4)], ())
    before = resident.materialize(plain), resident.candidate(WORDS).logits
    resident.materialize(path(*PATHS["a block in the middle"]))
    after = resident.materialize(plain), resident.candidate(WORDS).logits
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])


def test_fingerprints_tell_blocks_apart_that_have_the_same_weights(resident: ResidentModels) -> None:
    layers: list[Layer] = [("base", layer) for layer in range(4)]
    blocks: list[Blocks] = [(), ((0, 2),), ((1, 3),), ((0, 2), (2, 4)), ((0, 4),)]
    found = [resident.materialize(path(layers, parallel)) for parallel in blocks]
    assert len(set(found)) == len(found)
    assert found == [resident.materialize(path(layers, parallel)) for parallel in blocks]


@torch.no_grad()
def test_a_merge_of_whole_models_may_run_layers_side_by_side(
    resident: ResidentModels, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    sources = tuple(Source(model=name, parameters={"weight": 0.5}) for name in ("first", "second"))
    recipe = Recipe(merge_method="linear", models=sources, dtype="float32")
    paths = {name: str(folder) for name, folder in tiny_models.items()}
    checkpoint.merge(recipe.renamed(paths), tmp_path / "merged", "the recipe", card=False)
    layers: list[Layer] = [("merged", layer) for layer in range(4)]
    expected = Written({"merged": tmp_path / "merged"})(layers, ((1, 4),))
    resident.materialize(recipe.model_copy(update={"evomerge": Provenance(parallel=((1, 4),))}))
    assert torch.allclose(behind_the_last_layer(resident.candidate), expected, atol=1e-5)


@torch.no_grad()
def test_a_model_that_is_divided_over_devices_computes_the_same(
    resident: ResidentModels, tiny_models: dict[str, Path]
) -> None:
    divided = load_models(tiny_models, tiny_models["base"], "cpu", "float32", count=2)
    for layers, parallel in PATHS.values():
        fingerprints = {one.materialize(path(layers, parallel)) for one in (divided, resident)}
        assert len(fingerprints) == 1
        assert torch.equal(divided.candidate(WORDS).logits, resident.candidate(WORDS).logits)


def test_no_checkpoint_is_written(tiny_models: dict[str, Path]) -> None:
    recipe = path(*PATHS["a loop"])
    with pytest.raises(InputError, match=r"evomerge\.parallel runs layers 1 to 2 side by side, which no architecture"):
        StreamedMerge(recipe, models(tiny_models, tiny_models["base"]), "recipe.yaml", "cpu", "float32")


def test_blocks_beyond_the_last_layer_are_refused(resident: ResidentModels) -> None:
    with pytest.raises(InputError, match=r"evomerge\.parallel names layers \[1, 5\) of the output, which has 4"):
        resident.materialize(path([("base", layer) for layer in range(4)], ((1, 5),)))


def test_a_head_with_another_name_in_checkpoints_has_its_derivative_in_a_view(tmp_path: Path) -> None:
    folders = architectures.family("gpt_neox", tmp_path, ("base", "first"), layers=3)
    resident = load_models(folders, folders["base"], "cpu", "float32")
    resident.materialize(path([("first", 0), ("first", 1), ("first", 2)], ((0, 2),)))
    with resident.following(["scale"]) as followed:
        loss_of(resident.candidate(WORDS, use_cache=False).logits).backward()
    written = Written(folders)
    model = written.models["first"]
    hidden = written([("first", 0), ("first", 1), ("first", 2)], ((0, 2),))
    loss_of(model.get_output_embeddings()(model.gpt_neox.final_layer_norm(hidden))).backward()
    head = model.get_output_embeddings().weight
    found = followed.totals()["embed_out.weight", "first", "scale"]
    assert found == pytest.approx(float((head.grad * head.detach()).sum()), rel=1e-3)
