"""The license that a merge's card carries, and what its user is warned of."""

from pathlib import Path

import pytest
import yaml

from evomerge import recipe as recipes
from evomerge import zoo
from evomerge.export import checkpoint
from evomerge.export.licenses import KINDS, combined, stated_license


def card(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("text", "license"),
    [
        ("---\nlicense: mit\n---\n# A model", "mit"),
        ("---\nlanguage: en\nlicense: Apache-2.0\ntags: [x]\n---\n", "apache-2.0"),
        ("---\nlicense: [mit, gpl-3.0]\n---\n", "gpl-3.0"),
        ("---\nlicense: other\nlicense_name: qwen\n---\n", "other"),
        ("---\nlanguage: en\n---\n", None),
        ("---\nlicense:\n---\n", None),
        ("---\nlicense: []\n---\n", None),
        ("# A model\n\nlicense: mit\n", None),
        ("# A model\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: {unclosed\n---\n", None),
        ("---\n- a list\n---\n", None),
        ("", None),
    ],
)
def test_the_license_is_read_from_the_front_matter(text, license, tmp_path):
    assert stated_license([card(tmp_path / "model", text)]) == license


def test_a_model_without_a_card_states_none(tmp_path):
    assert stated_license([tmp_path]) is None


def test_a_model_with_an_adapter_has_the_terms_of_both(tmp_path):
    model = card(tmp_path / "model", "---\nlicense: mit\n---\n")
    adapter = card(tmp_path / "adapter", "---\nlicense: gemma\n---\n")
    assert stated_license([model, adapter]) == "gemma"
    assert stated_license([model, tmp_path]) is None


@pytest.mark.parametrize(
    ("licenses", "license"),
    [
        (["mit"], "mit"),
        (["mit", "apache-2.0", "mit"], "apache-2.0"),
        (["apache-2.0", "llama3.1"], "llama3.1"),
        (["cc-by-nc-4.0", "mit"], "cc-by-nc-4.0"),
        (["openrail", "cc0-1.0"], "openrail"),
    ],
)
def test_the_most_restrictive_license_is_taken_without_a_word_where_the_others_allow_it(licenses, license):
    verdict = combined({f"model {index}": each for index, each in enumerate(licenses)})
    assert (verdict.license, verdict.warnings) == (license, ())


@pytest.mark.parametrize("unknown", [None, "other", "my-own-license"])
def test_one_unknown_license_makes_the_merge_s_unknown(unknown):
    verdict = combined({"a": "mit", "b": unknown})
    assert verdict.license == "other"
    assert len(verdict.warnings) == 1
    assert verdict.warnings[0].startswith("the license of b is unknown")


def test_terms_that_all_hold_at_once_are_told():
    verdict = combined({"a": "llama3", "b": "gemma", "c": "mit"})
    assert verdict.license == "llama3"
    assert "may contradict each other" in verdict.warnings[0]
    assert "llama3 (a:" in verdict.warnings[0]
    assert "gemma (b:" in verdict.warnings[0]
    assert combined({"a": "agpl-3.0", "b": "cc-by-nc-4.0"}).warnings
    assert not combined({"a": "gemma", "b": "gemma"}).warnings


def test_a_license_that_forbids_derivatives_is_told():
    verdict = combined({"a": "cc-by-nc-nd-4.0", "b": "mit"})
    assert verdict.license == "cc-by-nc-nd-4.0"
    assert "forbids to share what is made of it" in verdict.warnings[0]


def test_every_license_is_of_one_kind():
    identifiers = [identifier for _, kind in KINDS.values() for identifier in kind]
    assert len(identifiers) == len(set(identifiers))


def test_the_card_of_a_merge_carries_it_with_its_warnings(tiny_models, tmp_path):
    told: list[str] = []
    mixed = recipes.linear({"zoo:base": 0.5, "zoo:math": 0.5})
    checkpoint.merge(mixed, tmp_path / "known", "recipe.yaml", warn=told.append)
    assert not told
    checkpoint.merge(recipes.single(str(tiny_models["first"])), tmp_path / "unknown", "recipe.yaml", warn=told.append)
    fronts, bodies = {}, {}
    for name in ("known", "unknown"):
        _, front, bodies[name] = (tmp_path / name / "README.md").read_text().split("---\n", 2)
        fronts[name] = yaml.safe_load(front)
    assert fronts["known"] == {
        "base_model": ["zoo:base", "zoo:math"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": "apache-2.0",
        "tags": ["merge", "mergekit", "evomerge"],
    }
    assert "## License" not in bodies["known"]
    assert fronts["unknown"]["license"] == "other"
    assert len(told) == 1
    assert told[0][1:] in bodies["unknown"]


@pytest.mark.parametrize("name", zoo.names())
def test_the_embedded_models_state_theirs(name):
    assert stated_license([zoo.path(name)]) == "apache-2.0"
