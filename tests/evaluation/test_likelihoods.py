"""Frozen batches against one plain forward pass per request, and against lm-eval's own log-likelihoods."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from torch.nn import functional

from evomerge.evaluation.likelihoods import PreparedRequests, Request, Response
from evomerge.merging.building import load_model
from evomerge.zoo.language import VOCABULARY

CPU = torch.device("cpu")
ARCHITECTURES = ("llama", "qwen2", "gpt2", "gemma3")

tokens = st.lists(st.integers(3, 7), min_size=1, max_size=12).map(tuple)  # few words, so that prefixes are shared
requests = st.lists(st.builds(Request, tokens, tokens), min_size=1, max_size=12)
without_reset = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def built(models):
    return {name: load_model(models[name], torch.float32) for name in ARCHITECTURES}


@torch.inference_mode()
def plain(model, request, max_length):
    """One row, no padding, log_softmax over everything."""
    continuation = request.continuation[-max_length:]
    whole = (*request.context, *continuation)[-(max_length + 1) :]
    logits = model(input_ids=torch.tensor([whole[:-1]])).logits[0].to(torch.float32)
    scored = functional.log_softmax(logits, dim=-1)[-len(continuation) :]
    targets = torch.tensor(continuation)
    chosen = scored.gather(1, targets[:, None])
    others = scored.scatter(1, targets[:, None], -torch.inf).amax(dim=1)
    lead = float((chosen[:, 0] - others).min())
    return Response(float(chosen.sum()), bool((scored.argmax(dim=-1) == targets).all()), lead)


def assert_close(found, expected):
    assert [response.greedy for response in found] == [response.greedy for response in expected]
    likelihoods = [response.log_likelihood for response in expected]
    assert [response.log_likelihood for response in found] == pytest.approx(likelihoods, abs=1e-4, rel=1e-5)
    assert [response.margin for response in found] == pytest.approx([each.margin for each in expected], abs=1e-4)


def random_requests(count, longest, seed):
    """Requests of every length up to `longest` tokens, a third of them behind a shared context."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length):
        return tuple(torch.randint(1, len(VOCABULARY), (length,), generator=generator).tolist())

    shared = draw(longest // 2)
    found = []
    for number in range(count):
        length = 2 + int(torch.randint(longest - 1, (1,), generator=generator))
        ends = 1 + int(torch.randint(length - 1, (1,), generator=generator))
        whole = draw(length)
        found.append(Request(shared if number % 3 == 0 else whole[:ends], whole[ends:] or whole[:1]))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@given(requests=requests, batch_size=st.integers(1, 9), max_length=st.integers(2, 26))
@without_reset
def test_any_requests_score_as_one_at_a_time(architecture, built, requests, batch_size, max_length):
    model = built[architecture]
    found = PreparedRequests(requests, batch_size, max_length, CPU).run(model)
    assert_close(found, [plain(model, request, max_length) for request in requests])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("max_length", [None, 20])
def test_likelihoods_and_truncation_are_lm_eval_s(architecture, max_length, built, load):
    model, tokenizer = built[architecture], load("base")[1]
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=max_length)
    requests = random_requests(60, lm.max_length + 10, seed=1)
    requests = [Request(r.context, r.continuation[: lm.max_length]) for r in requests]  # lm-eval takes no longer ones
    assert max(len(r.context) + len(r.continuation) for r in requests) > lm.max_length + 1
    theirs = lm._loglikelihood_tokens([(None, list(r.context), list(r.continuation)) for r in requests])
    ours = PreparedRequests(requests, 7, lm.max_length, CPU).run(model)
    assert_close(ours, [Response(*answer, own.margin) for answer, own in zip(theirs, ours, strict=True)])


def test_what_greedy_decoding_writes_is_greedy_and_one_other_token_is_not(built):
    model = built["llama"]
    context = (1, 4, 20, 30, 5)
    written = context
    for _ in range(4):
        with torch.inference_mode():
            written += (int(model(input_ids=torch.tensor([written])).logits[0, -1].argmax()),)
    right = written[len(context) :]
    wrong = [(*right[:place], (right[place] + 1) % 70, *right[place + 1 :]) for place in range(4)]
    requests = [Request(context, continuation) for continuation in [right, *wrong]]
    found = PreparedRequests(requests, 2, 128, CPU).run(model)
    assert [response.greedy for response in found] == [True, False, False, False, False]


class Counting(torch.nn.Module):
    """A model that counts the rows and columns it is asked for; takes no `logits_to_keep`."""

    def __init__(self, model):
        super().__init__()
        self.model, self.shapes = model, []

    def forward(self, input_ids, use_cache):
        self.shapes.append(tuple(input_ids.shape))
        return self.model(input_ids=input_ids, use_cache=use_cache)


def test_options_of_one_token_share_a_row(built):
    context = (1, 4, 20, 30, 5)
    requests = [Request(context, (option,)) for option in range(3, 11)]
    counting = Counting(built["llama"])
    found = PreparedRequests(requests, 128, 128, CPU).run(counting)
    assert counting.shapes == [(1, len(context))]
    assert_close(found, [plain(built["llama"], request, 128) for request in requests])


def test_the_same_text_cut_at_different_places_shares_a_row_and_each_part_is_scored(built):
    text = (1, 4, 20, 30, 5, 9)
    requests = [Request(text[:cut], text[cut:]) for cut in range(1, 6)] * 2
    counting = Counting(built["qwen2"])
    found = PreparedRequests(requests, 128, 128, CPU).run(counting)
    assert counting.shapes == [(1, 5)]
    assert_close(found, [plain(built["qwen2"], request, 128) for request in requests])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_batch_size_moves_likelihoods_by_rounding_only(architecture, built):
    requests = random_requests(50, 40, seed=2)
    one, *others = (PreparedRequests(requests, size, 64, CPU).run(built[architecture]) for size in (1, 5, 50, 1000))
    for other in others:
        assert_close(other, one)


def test_a_second_run_is_bit_for_bit_the_same(built):
    prepared = PreparedRequests(random_requests(50, 40, seed=3), 16, 64, CPU)
    assert prepared.run(built["gpt2"]) == prepared.run(built["gpt2"])


def test_the_order_of_requests_changes_no_bit(built):
    requests = random_requests(50, 40, seed=4)
    forth = PreparedRequests(requests, 16, 64, CPU).run(built["llama"])
    back = PreparedRequests(requests[::-1], 16, 64, CPU).run(built["llama"])
    assert forth == back[::-1]


def test_a_model_in_bfloat16_is_normalized_in_float32(models):
    model = load_model(models["qwen2"], torch.bfloat16)
    requests = random_requests(8, 20, seed=5)
    found = PreparedRequests(requests, 1, 64, CPU).run(model)
    assert_close(found, [plain(model, request, 64) for request in requests])


def test_no_requests_have_no_responses(built):
    assert PreparedRequests([], 16, 64, CPU).run(built["llama"]) == []


@pytest.mark.parametrize("lead", [2.0, 6.0, 10.0])
def test_log_likelihoods_near_probability_one_keep_the_digits_of_a_log_softmax(lead):
    """However large the logits are, of which own - logsumexp would keep no more digits than they have themselves."""

    class Sure(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            logits = torch.zeros(*input_ids.shape, 8)
            logits[..., 3] = lead
            return type("Output", (), {"logits": logits + 1000.0})()

    (response,) = PreparedRequests([Request((4,), (3,))], 1, 8, CPU).run(Sure())
    exact = -torch.log1p(7 * torch.exp(torch.tensor(-lead, dtype=torch.float64))).item()
    assert response.log_likelihood == pytest.approx(exact, rel=3e-3 if lead == 10.0 else 1e-4)
