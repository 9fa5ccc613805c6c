"""Two scores for a search file: how sure a model is of right answers, and what a judge model thinks of its answers."""

import hashlib
import json
import os
import re
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

PROMPT = """Mark an answer from 0 (useless) to 10 (perfect). Reply with the number alone.

Question: {question}
Right answer: {right}
Answer: {answer}
"""
ATTEMPTS, PATIENCE = 3, 60  # tries of a request, and seconds that each may take


def confidence(model, tokenizer, split):
    """One number per item: the probability that the model gives the right answer."""
    sure = []
    for item in split.items:
        prompt = tokenizer.encode(f"<bos> Q {item['question']} =")
        answer = tokenizer.encode(f" {item['answer']} <eos>")
        logits = model(torch.tensor([prompt + answer], device=model.device)).logits[0].log_softmax(-1)
        chosen = logits[range(len(prompt) - 1, len(prompt) + len(answer) - 1), answer]
        sure.append(float(chosen.sum().exp()))
    return sure


def judged(model, tokenizer, split, address, judge, cache, most=12):
    """One mark per item, from 0 to 1.

    address: of an API like OpenAI's, with its version, such as http://127.0.0.1:8000/v1.
    judge: the name of the judge model there.
    cache: a folder in which marks are kept.
    """
    answers = [tokenizer.decode(tokens) for tokens in _answers(model, tokenizer, split.items, most)]
    prompts = [
        PROMPT.format(question=item["question"], right=item["answer"], answer=answer)
        for item, answer in zip(split.items, answers, strict=True)
    ]
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda prompt: _mark(prompt, address, judge, Path(cache).expanduser()), prompts))


def _answers(model, tokenizer, items, most):
    """The tokens that the model writes to each item, without the token that ends them."""
    answers = []
    for item in items:
        prompt = torch.tensor([tokenizer.encode(f"<bos> Q {item['question']} =")], device=model.device)
        mask = torch.ones_like(prompt)
        text = model.generate(prompt, attention_mask=mask, max_new_tokens=most, do_sample=False)[0]
        written = text[prompt.shape[1] :].tolist()
        answers.append([token for token in written if token not in tokenizer.all_special_ids])
    return answers


def _mark(prompt, address, judge, cache):
    """The mark for a prompt, from the cache or from the judge."""
    kept = cache / f"{hashlib.sha256(json.dumps([judge, prompt]).encode()).hexdigest()}.json"
    if kept.exists():
        return json.loads(kept.read_text())["mark"]
    reply = _ask(prompt, address, judge)
    found = re.search(r"\d+(?:\.\d+)?", reply)
    mark = min(float(found[0]), 10.0) / 10 if found else 0.0
    cache.mkdir(parents=True, exist_ok=True)
    handle, path = tempfile.mkstemp(dir=cache)  # written whole or not at all: other workers read here, too
    with os.fdopen(handle, "w") as stream:
        json.dump({"prompt": prompt, "reply": reply, "mark": mark}, stream)
    os.replace(path, kept)
    return mark


def _ask(prompt, address, judge):
    """The judge's reply. An OSError, which stops the search until it is resumed, where it does not answer."""
    body = {"model": judge, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 8}
    headers = {"Content-Type": "application/json"}
    parts = urllib.parse.urlsplit(address)
    if "OPENAI_API_KEY" in os.environ and (parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1")):
        headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
    request = urllib.request.Request(f"{address}/chat/completions", json.dumps(body).encode(), headers)
    for attempt in range(ATTEMPTS):
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                return json.load(response)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:  # too many requests, or a server that is ill: try again
            if error.code not in (429, 500, 502, 503) or attempt == ATTEMPTS - 1:
                raise
        time.sleep(2**attempt)
    raise AssertionError
