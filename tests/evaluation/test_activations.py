"""Losses that compare layers, against transformers in float64 on lm-eval's own prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from evomerge.candidate import Descent
from evomerge.errors import CandidateFailed, InputError
from evomerge.evaluation import activations
from evomerge.evaluation.activations import name_of
from evomerge.evaluation.harness import Harness
from tests.evaluation.material import questions
from tests.evaluation.reference import lm_eval_says

MODELS = ("zoo:base", "zoo:math", "zoo:lang")
WEIGHTS = {"qa": (("zoo:math", 0.75), ("zoo:lang", 0.25)), "choice:acc_norm": (("zoo:base", 1.0),)}
COMPARED = {"optimizer": {"learning": {"loss": "activations"}}}


def descent(*names: str, **changes: Any) -> Descent:
    usual = {"step": 0, "share": 1.0, "shard": 0, "shards": 1, "wanted": ("weight",)}
    sources = tuple((name, WEIGHTS[name]) for name in names)
    return Descent(**{**usual, **changes}, weights=tuple((name, 1.0) for name in names), sources=sources)


def put_out(model: Any, row: Sequence[int], places: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What every layer puts out at the last tokens of a row, shape (layers, tokens, channels), and the last logits."""
    kept: list[torch.Tensor] = []
    handles = [layer.register_forward_hook(lambda *given: kept.append(given[-1][0])) for layer in model.model.layers]
    logits = model(input_ids=torch.tensor([row])).logits[0, -1]
    for handle in handles:
        handle.remove()
    return torch.stack(kept)[:, -places:], logits


class Measured:
    """The outputs of layers, computed when they are asked for."""

    def __init__(self, model: Any, rows: Sequence[tuple[int, ...]], places: int) -> None:
        self._model, self._rows, self._places = model, {name_of(row): row for row in rows}, places

    @torch.no_grad()
    def read(self, name: str) -> torch.Tensor:
        row, _, head = name.partition(".")
        return put_out(self._model, self._rows[row], self._places)[bool(head)]


@pytest.fixture
def compared(load: Callable[[str], tuple[Any, Any]], search_config: Any) -> Callable[..., Harness]:
    """A harness whose model is math's, and which knows what the layers of all models put out."""

    def make(*names: str, places: int = activations.PLACES, batch_size: int = 16) -> Harness:
        config = search_config(*names, evaluation={"batch_size": batch_size}, **COMPARED)
        found: dict[str, Measured] = {}

        def outputs_of(reference: str) -> Measured:
            if reference not in found:
                model = load(reference.removeprefix("zoo:"))[0]
                found[reference] = Measured(model, harness.compared_rows, places)
            return found[reference]

        harness = Harness(config, *load("math"), outputs_of=outputs_of)
        return harness

    return make


class Exact:
    """The loss in float64, from what lm-eval asks of a model."""

    def __init__(self, load: Callable[[str], tuple[Any, Any]], places: int) -> None:
        self.merge = load("math")[0].double()
        self._models = {name: load(name.removeprefix("zoo:"))[0].double() for name in MODELS}
        self._lm, self._places = HFLM(pretrained=load("base")[0], tokenizer=load("base")[1]), places

    def rows(self, item: dict[str, Any]) -> list[list[int]]:
        """The distinct prompts of an item."""
        prompts = []
        for context, *_ in item["arguments"]:
            row = self._lm.tok_encode(context) if context else [self._lm.prefix_token_id]
            prompts += [] if row in prompts else [row]
        return prompts

    def distances(self, model: Any, row: tuple[int, ...], known: Mapping[str, Any], weights: Any) -> torch.Tensor:
        """The mean squared distance of each layer and of the logits from an average."""
        targets = [sum(weight * known[name][kind] for name, weight in weights) for kind in range(2)]
        layers, logits = (own - target for own, target in zip(put_out(model, row, self._places), targets, strict=True))
        return torch.cat([layers.square().mean((1, 2)), logits.square().mean()[None]])

    def loss(self, items: Sequence[dict[str, Any]], weights: tuple[tuple[str, float], ...]) -> torch.Tensor:
        with torch.no_grad():
            rows = {tuple(row) for item in items for row in self.rows(item)}
            known = {
                row: {name: put_out(model, row, self._places) for name, model in self._models.items()} for row in rows
            }
            from_base = [
                self.distances(self._models[name], row, known[row], (("zoo:base", 1.0),))
                for row in rows
                for name in MODELS[1:]
            ]
            scale = torch.stack(from_base).mean(0)
        losses = []
        for item in items:
            read = [tuple(row) for row in self.rows(item)]
            losses += [
                sum((self.distances(self.merge, row, known[row], weights) / scale).mean() for row in read) / len(read)
            ]
        return sum(losses) / len(losses)


def slopes(harness: Harness, request: Descent) -> torch.Tensor:
    """The gradient on all parameters that have one."""
    for parameter in harness._model.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    harness.descend(harness._model, request)
    return torch.cat([own.grad.flatten() for own in harness._model.parameters() if own.grad is not None])


@pytest.mark.parametrize("places", [activations.PLACES, 2])
def test_the_loss_and_its_gradient_are_those_of_the_distance_from_the_average_of_the_sources(
    places, compared, load, qa_task, choice_task, monkeypatch
):
    monkeypatch.setattr(activations, "PLACES", places)
    tasks = {"qa": qa_task(), "choice:acc_norm": choice_task(count=6)}
    harness, exact = compared(*tasks, places=places, batch_size=5), Exact(load, places)
    losses = harness.descend(harness._model, descent(*tasks))
    expected = {}
    for name, task in tasks.items():
        _, items = lm_eval_says(task | {"test_split": "search"}, *load("base"))
        expected[name] = exact.loss(items, WEIGHTS[name])
    assert losses == pytest.approx({name: loss.item() for name, loss in expected.items()}, rel=1e-4)
    sum(expected.values()).backward()
    gradient = torch.cat([own.grad.flatten() for own in exact.merge.parameters() if own.grad is not None])
    torch.testing.assert_close(
        slopes(harness, descent(*tasks)).double(), gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())
    )


def test_a_merge_that_is_the_only_source_has_no_loss_and_one_like_the_base_has_the_distance_of_the_models(
    compared, qa_task, load
):
    qa_task()
    harness = compared("qa")
    alone = replace(descent("qa"), sources=(("qa", (("zoo:math", 1.0),)),))
    assert harness.descend(harness._model, alone)["qa"] < 1e-6
    from_base = [
        replace(descent("qa"), sources=(("qa", ((reference, 1.0),)),)) for reference in ("zoo:math", "zoo:lang")
    ]
    base = load("base")[0]
    assert sum(harness.descend(base, each)["qa"] for each in from_base) / 2 == pytest.approx(1, rel=1e-4)


def test_losses_do_not_depend_on_the_batch_size_and_shards_sum_up_to_the_whole(compared, qa_task, choice_task):
    qa_task()
    choice_task(count=15)
    names, few = ("qa", "choice:acc_norm"), {"share": 0.5, "step": 3}
    wide, narrow = compared(*names, batch_size=64), compared(*names, batch_size=1)
    whole = wide.descend(wide._model, descent(*names, **few))
    assert narrow.descend(narrow._model, descent(*names, **few)) == pytest.approx(whole, rel=1e-4)
    parts = [wide.descend(wide._model, descent(*names, **few, shard=shard, shards=3)) for shard in range(3)]
    assert {name: sum(part[name] for part in parts) for name in names} == pytest.approx(whole, rel=1e-5)


def test_answers_change_nothing_and_texts_without_prompts_are_read_themselves(compared, choice_task, text_task):
    losses = []
    for turned in (False, True):
        choice_task(count=9, **({"doc_to_target": "{{(gold + 1) % 2}}"} if turned else {}))
        harness = compared("choice:acc_norm")
        losses.append(harness.descend(harness._model, descent("choice:acc_norm")))
    assert losses[0] == losses[1]
    rows = [{"question": "kim " * number + row["question"]} for number, row in enumerate(questions(8, 1))]
    text_task([*rows, {"question": "", "answer": ""}])
    harness = compared("text:word_perplexity")
    lm = harness._lm
    read = {tuple([lm.prefix_token_id, *lm.tok_encode(row["question"])][:-1]) for row in rows}
    assert set(harness.compared_rows) == read


def test_layers_that_put_out_something_else_are_refused(compared, qa_task):
    qa_task()
    harness = compared("qa")
    harness._model.model.layers[-1].register_forward_hook(lambda *given: given[-1][None])
    with pytest.raises(
        InputError, match=r"no layers that put out one vector for each token; use likelihood or entropy"
    ):
        activations.outputs(harness._model, [(1, 2, 3)])


def test_a_loss_that_is_no_number_fails_the_candidate(compared, qa_task):
    qa_task()
    harness = compared("qa")
    with torch.no_grad():
        next(harness._model.parameters())[5:] = float("nan")
    with pytest.raises(CandidateFailed, match="the loss of qa is nan"):
        harness.descend(harness._model, descent("qa"))


def test_a_task_of_empty_texts_has_nothing_to_compare(compared, text_task):
    rows = [{"question": "", "answer": str(number)} for number in range(8)]
    text_task(rows, "empty")
    with pytest.raises(InputError, match="no search item has a text"):
        _ = compared("empty:word_perplexity").compared_rows
