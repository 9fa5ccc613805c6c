"""Packed rows: nothing is lost in packing, and a model makes of them what it makes of full rows."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    Qwen3Config,
)

from evomerge.errors import InputError
from evomerge.evaluation.harness import Harness
from evomerge.evaluation.likelihoods import PreparedRequests, Request
from evomerge.evaluation.packing import LONGEST, pack
from evomerge.evaluation.packing_probe import takes_packed_rows
from evomerge.merging.building import load_model

CPU = torch.device("cpu")
rows = st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=12).map(tuple), min_size=1, max_size=9, unique=True)


@given(rows)
def test_every_row_is_in_one_packed_row_with_its_own_tokens_at_its_own_positions(rows):
    unpacked = []
    for packed in pack(rows):
        tokens, positions, segments = packed.tokens, packed.positions, packed.segments
        assert len(tokens) == len(positions) == len(segments)
        for number, (row, offset) in enumerate(zip(packed.rows, packed.offsets(), strict=True), 1):
            mine = [place for place, segment in enumerate(segments) if segment in (0, number)]
            assert tuple(tokens[place] for place in mine) == row
            assert [positions[place] for place in mine] == list(range(len(row)))
            assert mine == [place if place < packed.prefix else place + offset for place in range(len(row))]
            unpacked.append(row)
    assert sorted(unpacked) == sorted(rows)


@given(rows)
def test_rows_are_packed_only_where_they_share_most_of_their_tokens(rows):
    for packed in pack(rows):
        longest = max(map(len, packed.rows))
        assert len(packed.rows) == 1 or longest < 2 * packed.prefix
        assert len(packed.tokens) <= LONGEST * longest


def test_options_of_a_document_cost_their_prefix_once():
    prefix = tuple(range(3, 53))
    requests = [Request(prefix, (option, 7, 8), 0) for option in (60, 61, 62, 63)]
    alone, packed = (PreparedRequests(requests, 8, 128, CPU, packed=how).batches for how in (False, True))
    assert [tuple(batch.ids.shape) for batch in alone] == [(4, 52)]
    assert [tuple(batch.ids.shape) for batch in packed] == [(1, 58)]
    assert [len(batch.reads) for batch in packed] == [1 + 4 * 2]  # the last of the prefix serves all four


SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
TAKE = {
    "llama": LlamaConfig(**SMALL),
    "a window in every layer": MistralConfig(**SMALL, sliding_window=8),
    "partial rotation": Phi3Config(**SMALL, pad_token_id=0),
    "a window in some layers and plain attention": Gemma2Config(**SMALL, sliding_window=8, head_dim=8),
    "normalized queries": Qwen3Config(**SMALL),
    "learned positions": GPT2Config(n_embd=32, n_layer=2, n_head=4),
}
DO_NOT = {
    "positions as a bias on attention": BloomConfig(hidden_size=32, n_layer=2, n_head=4),
    "a recurrent state": MambaConfig(hidden_size=32, num_hidden_layers=2),
    "chunks": Llama4TextConfig(**SMALL, num_key_value_heads=2, num_local_experts=2),
}


@pytest.mark.parametrize("name", [*TAKE, *DO_NOT])
def test_architectures_that_take_packed_rows_are_told_from_those_that_do_not(name, tmp_path):
    (TAKE | DO_NOT)[name].save_pretrained(tmp_path)
    state = torch.get_rng_state()
    assert takes_packed_rows(tmp_path) == (name in TAKE)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_folder_without_a_model_takes_none(tmp_path):
    assert not takes_packed_rows(tmp_path)


def documents(model: Path) -> list[Request]:
    """Documents with long and short prefixes, one-token and multi-token options, one option that begins another."""
    generator = torch.Generator().manual_seed(len(str(model)))

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 70, (count,), generator=generator).tolist())

    requests = []
    for number, length in enumerate((30, 3, 50, 17, 1)):
        prefix, option = draw(length), draw(2)
        options = [draw(1), draw(1), option, option + draw(3), draw(6)]
        requests += [Request(prefix, each, number) for each in options]
        requests.append(Request(prefix[:-1] or prefix, prefix[-1:] + draw(2), number))  # cut at another place
        requests.append(Request((1,), option, number))  # without the question
    return requests


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gemma3"])
@pytest.mark.parametrize("batch_size", [3, 100])
def test_packed_options_score_as_full_rows(architecture, batch_size, models):
    model = load_model(models[architecture], torch.float32)
    requests = documents(models[architecture])
    packed = PreparedRequests(requests, batch_size, 45, CPU, packed=True)
    assert any(batch.segments is not None for batch in packed.batches)
    found, expected = packed.run(model), PreparedRequests(requests, 1, 45, CPU).run(model)
    assert [each.greedy for each in found] == [each.greedy for each in expected]
    for attribute in ("log_likelihood", "margin"):
        values = [getattr(each, attribute) for each in expected]
        assert [getattr(each, attribute) for each in found] == pytest.approx(values, abs=1e-4)


def test_what_stands_in_another_option_changes_no_bit(models):
    model = load_model(models["gemma3"], torch.float32)
    prefix = tuple(range(10, 40))
    first, second = (
        PreparedRequests([Request(prefix, (5, 6, 7), 0), Request(prefix, other, 0)], 8, 90, CPU, packed=True)
        for other in ((8, 9, 10), (60, 61, 62))
    )
    assert first.run(model)[0] == second.run(model)[0]


def test_a_model_that_takes_no_packed_rows_is_refused_them(load, choice_task, search_config):
    choice_task()
    model = BloomForCausalLM(BloomConfig(vocab_size=79, hidden_size=32, n_layer=1, n_head=2)).eval()
    harness = Harness(search_config("choice", evaluation={"prefix_sharing": "mask"}), model, load("base")[1])
    with pytest.raises(InputError, match=r"evaluation.prefix_sharing is 'mask', which this model does not take"):
        harness.prepare("search")


def test_a_model_that_takes_masks_and_misreads_them_is_refused_packed_rows(
    load, choice_task, search_config, monkeypatch
):
    choice_task()
    config = search_config("choice", evaluation={"prefix_sharing": "mask"})
    monkeypatch.setattr("evomerge.evaluation.likelihoods.attention", lambda *_: None)
    with pytest.raises(InputError, match=r"log-likelihoods differ by .* from those without; set it to 'none'"):
        Harness(config, *load("qwen2")).prepare("search")
