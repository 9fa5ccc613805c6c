"""Functions that a program hands over as objectives."""

import __future__

import linecache
from pathlib import Path
from typing import Any

import pytest

import evomerge
from evomerge.errors import InputError
from evomerge.library.functions import named
from tests.own_scores import ITEMS, own_search, write_files

HERE = 3
LATER = __future__.annotations.compiler_flag


def of_a_module(model: Any, tokenizer: Any, split: Any) -> float:
    return float(model.get_input_embeddings().weight.norm()) / HERE


def typed(source: str) -> Any:
    """A function as a notebook has it: its module is __main__, and its source is in no file."""
    name = f"<cell {hash(source)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    space: dict[str, Any] = {"__name__": "__main__", "ABOVE": 2}
    exec(compile(source, name, "exec", LATER), space)
    return space["score"]


def test_functions_in_files_and_in_notebooks_are_objectives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    lengths = typed(
        "def score(model: Whatever, tokenizer, split):\n"
        "    import math\n"
        "    return [math.sqrt(len(item['text'])) + float(model.lm_head.weight.norm()) for item in split.items]\n"
    )
    document = own_search()
    del document["tasks"]["allow_code"]
    given = [{"task": "base_qa"}, of_a_module, {"python": lengths, "name": "length", "items": "items.jsonl"}]
    run = evomerge.search(document, output=tmp_path / "run", objectives=given)
    scores = run.candidates
    assert scores["search.of_a_module"].nunique() > 3
    assert scores["search.length"].nunique() > 3
    assert run.state == "finished"
    longer = run.resume({"optimizer.evaluations": 8})
    assert longer.candidates["search.length"].notna().sum() == len(scores) + 4
    assert len(ITEMS) == 32


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def score(model, tokenizer, split): return ABOVE", "score uses ABOVE, which stands outside of it"),
        ("def score(model, tokenizer, split): return [BELOW(i) for i in split.items]", "score uses BELOW"),
        ("score = lambda model, tokenizer, split: 1.0", "has no name by which workers could find it"),
    ],
)
def test_a_function_that_cannot_go_along_is_refused(source: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"objectives\[0\].python: .*{says}"):
        named({"objectives": [{"python": typed(source)}]}, tmp_path)


def test_a_closure_and_an_object_are_refused(tmp_path: Path) -> None:
    def made(factor: float) -> Any:
        def score(model: Any, tokenizer: Any, split: Any) -> float:
            return factor

        return score

    for wrong in (made(2.0), of_a_module.__call__, print):
        with pytest.raises(InputError, match=r"objectives\[0\].python: "):
            named({"objectives": [{"python": wrong}]}, tmp_path)
