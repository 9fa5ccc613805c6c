"""Quantized candidates: close to the merge, of the same fingerprint, and smaller while they are made."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from evomerge.merging.resident.models import ResidentModels
from evomerge.merging.resident.quantized import Int8Linear, restore
from evomerge.recipe import Recipe, Source
from evomerge.workers.memory import LiveBytes
from tests.models import load_models

PARENTS = ("first", "second", "third")


def recipe(method: str = "ties", weight: float = 0.4) -> Recipe:
    sources = tuple(Source(model=model, parameters={"weight": weight, "density": 0.5}) for model in PARENTS)
    return Recipe(merge_method=method, base_model="base", models=sources)


def resident(tiny_models, dtype: str = "float32", **given) -> ResidentModels:
    return load_models(tiny_models, tiny_models["base"], "cpu", dtype, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_is_at_most_half_a_step_of_its_channel_away(dtype):
    draw = torch.Generator().manual_seed(0)
    weight = (torch.randn(300, 17, generator=draw) * torch.logspace(-2, 2, 300)[:, None]).to(dtype)
    weight[5] = 0
    linear = nn.Linear(17, 300, dtype=dtype)
    layer = Int8Linear(linear)
    layer.take(weight)
    step = weight.float().abs().amax(1, keepdim=True) / 127
    rounding = weight.float().abs() * torch.finfo(dtype).eps * 2
    assert ((layer.multiplied().float() - weight.float()).abs() <= 0.5 * step * (1 + 1e-2) + rounding).all()
    assert layer.multiplied().dtype == dtype
    inputs = torch.randn(4, 17, generator=draw).to(dtype)
    expected = nn.functional.linear(inputs, layer.multiplied(), linear.bias)
    assert torch.equal(layer(inputs), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties"])
def test_a_quantized_candidate_has_the_fingerprint_of_the_merge_and_nearly_its_answers(tiny_models, method, dtype):
    models = resident(tiny_models, dtype, quantized=True)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        quantized = models.materialize(recipe(method), quantized=True)
        approximate = models.candidate(tokens).logits.float()
        assert models.materialize(recipe(method)) == quantized
        exact = models.candidate(tokens).logits.float()
        assert resident(tiny_models, dtype).materialize(recipe(method)) == quantized
    assert not torch.equal(approximate, exact)
    assert (approximate - exact).std() < 0.05 * exact.std()


def test_a_model_that_was_quantized_answers_like_one_that_never_was(tiny_models):
    tokens = torch.arange(12).view(1, 12)
    models, plain = resident(tiny_models, quantized=True), resident(tiny_models)
    with torch.no_grad():
        for weight in (0.2, 0.7):
            models.materialize(recipe(weight=0.9), quantized=True)
            models.materialize(recipe(weight=weight))
            plain.materialize(recipe(weight=weight))
            assert torch.equal(models.candidate(tokens).logits, plain.candidate(tokens).logits)


def test_linear_layers_of_the_blocks_are_quantized_and_nothing_else(tiny_models):
    model = resident(tiny_models, quantized=True).model
    whole = {path for path, module in resident(tiny_models).model.named_modules() if isinstance(module, nn.Linear)}
    quantized = {path for path, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert quantized == whole - {"lm_head"}
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(
        parameter.numel() for parameter in resident(tiny_models).model.parameters()
    )
    restore(model)
    assert {path for path, module in model.named_modules() if isinstance(module, nn.Linear)} == whole


@pytest.fixture
def wide_models(tmp_path):
    """Llamas whose layers, as in large models, have far more parameters than their embeddings."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4
    )
    for name in ("base", *PARENTS):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in ("base", *PARENTS)}


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_quantized_merge_never_takes_the_memory_of_a_whole_one(wide_models, method):
    def taken(quantized: bool) -> tuple[int, int]:
        with LiveBytes(says_yes=True) as live:
            models = resident(wide_models, "bfloat16", rehearsal=True, quantized=quantized)
            held = live.peak = live.now
            models.rehearse(recipe(method))
            return held, live.peak

    (held, peak), (whole, whole_peak) = taken(True), taken(False)
    layers = [
        layer
        for layer in resident(wide_models, "bfloat16", rehearsal=True, quantized=True).model.modules()
        if isinstance(layer, Int8Linear)
    ]
    saved = sum(layer.weight.numel() - layer.scale.nbytes for layer in layers)
    assert held == whole - saved
    assert peak < whole_peak - 0.5 * saved  # beside a tensor on its way into 8 bits
    assert saved > 0.45 * sum(2 * layer.weight.numel() for layer in layers)
