"""Vocabularies that differ, beside mergekit: the same tokens, each with the same embedding, in every form of recipe."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from evomerge import recipe as recipes
from evomerge.errors import InputError
from evomerge.export import checkpoint
from evomerge.merging.streamed.chat_templates import CHAT_TEMPLATES
from tests.models import load_models

SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}"


def tokenizer(words: list[str], added: list[str], template: str | None) -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({word: row for row, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.add_tokens(added)
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Three models: B has more tokens than A in another order, C has rows that no token uses, and one of B's tokens."""
    root = tmp_path_factory.mktemp("vocabularies")
    made = {
        "A": (tokenizer([*SPECIAL, *WORDS[:6]], [], None), 9),
        "B": (tokenizer(["six", *WORDS[1:5], *SPECIAL, "nine", "one"], ["<extra>", "<tool>"], TEMPLATE), 12),
        "C": (tokenizer([*SPECIAL, *WORDS], ["<tool>"], TEMPLATE), 16),
    }
    for seed, (name, (words, rows)) in enumerate(made.items()):
        torch.manual_seed(seed)
        ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
        config = LlamaConfig(
            vocab_size=rows,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            **ids,
        )
        model = AutoModelForCausalLM.from_config(config)
        model.generation_config = GenerationConfig(**ids)
        model.save_pretrained(root / name)
        words.save_pretrained(root / name)
    return {name: root / name for name in made}


@pytest.fixture
def load(models, tmp_path) -> Callable[[str], recipes.Recipe]:
    def read(text: str) -> recipes.Recipe:
        for name, folder in models.items():
            text = text.replace(f"${name}", str(folder))
        (tmp_path / "recipe.yaml").write_text(text)
        return recipes.load(tmp_path / "recipe.yaml")

    return read


def by_token(folder: Path) -> dict[str, Any]:
    """A checkpoint's tensors, and what of them belongs to each token."""
    tensors = load_file(folder / "model.safetensors")
    rows = [tensors.pop(name) for name in ("model.embed_tokens.weight", "lm_head.weight")]
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    tokens = {text: torch.cat([table[row] for table in rows]) for text, row in vocabulary.items()}
    padding = torch.cat([table[len(vocabulary) :] for table in rows])
    return {**tensors, **tokens, "padding": padding, "size": torch.tensor(rows[0].shape)}


SOUP = """
models:
  - {model: $A, parameters: {weight: 0.7}}
  - {model: $B, parameters: {weight: 0.2}}
  - {model: $C, parameters: {weight: 0.4}}
merge_method: linear
base_model: $A
"""
# for mergekit a base is part of a soup whenever it is given, so this one has none
HEADLESS = SOUP.replace("base_model: $A", "")
VOCABULARIES = {
    "the base's tokens": SOUP + "tokenizer_source: base",
    "everyone's tokens": SOUP + "tokenizer_source: union",
    "another model's tokens": SOUP + "tokenizer_source: $B",
    "the tokens of a model that is not merged": """
        models: [{model: $A, parameters: {weight: 1}}, {model: $C, parameters: {weight: 0.5}}]
        merge_method: linear
        base_model: $A
        tokenizer_source: $B
        """,
    "a task vector between vocabularies": """
        models: [{model: $A}, {model: $B, parameters: {weight: 0.7}}, {model: $C, parameters: {weight: 0.4}}]
        merge_method: task_arithmetic
        base_model: $A
        tokenizer_source: union
        """,
    "padding to a multiple": SOUP + "tokenizer: {source: union, pad_to_multiple_of: 8}",
    "the default of tokenizer": SOUP + "tokenizer: {}",
    "tokens with sources": SOUP
    + """
tokenizer:
  source: union
  tokens:
    <tool>: {source: $C}
    nine: {source: {kind: zero}}
    one: {source: {kind: model_token, model: $B, token: nine}, force: true}
    two: {source: {kind: model_token, model: $C, token_id: 15}, force: true}
    three: {source: $B, force: true}
    <new>: {source: {kind: model_token, model: $A, token: <s>}}
  pad_to_multiple_of: 5
""",
    "a slice whose base is another": """
        slices:
          - sources: [{model: $A, layer_range: [0, 1]}, {model: $B, layer_range: [0, 1]}]
            base_model: $B
          - sources: [{model: $B, layer_range: [0, 1]}, {model: $C, layer_range: [0, 1]}]
            base_model: $B
        merge_method: slerp
        base_model: $A
        parameters: {t: 0.3}
        tokenizer_source: union
        """,
}


@pytest.mark.parametrize("text", VOCABULARIES.values(), ids=VOCABULARIES.keys())
def test_every_token_has_the_embedding_that_mergekit_gives_it(text, load, tmp_path):
    recipe = load(text)
    checkpoint.merge(recipe, tmp_path / "ours", "recipe.yaml")
    config = MergeConfiguration.model_validate(yaml.safe_load(recipe.to_yaml()))
    run_merge(config, str(tmp_path / "theirs"), MergeOptions(quiet=True, write_model_card=False, clone_tensors=True))
    ours, theirs = by_token(tmp_path / "ours"), by_token(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name].double(), tensor.double(), rtol=0, atol=1e-6), name


def test_the_average_stands_in_where_there_is_no_base(load, models, tmp_path):
    """mergekit takes any of the models for its base then, in an order that changes from run to run."""
    checkpoint.merge(load(HEADLESS + "tokenizer_source: union"), tmp_path / "out", "recipe.yaml")
    ours = by_token(tmp_path / "out")["<tool>"]
    b, c = (by_token(models[name])["<tool>"] for name in "BC")
    assert torch.allclose(ours, (0.7 * (b + c) / 2 + 0.2 * b + 0.4 * c) / 1.3, atol=1e-6)


def test_special_tokens_keep_their_meaning_when_their_ids_move(load, tmp_path):
    """mergekit leaves the base's ids in the config, where they stand for other words then."""
    checkpoint.merge(load(SOUP + "tokenizer_source: $B"), tmp_path / "out", "recipe.yaml")
    words, model = (kind.from_pretrained(tmp_path / "out") for kind in (AutoTokenizer, AutoModelForCausalLM))
    assert words.convert_tokens_to_ids("</s>") == words.eos_token_id == 7
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id) == (6, 7)
    assert model.config.vocab_size == len(words.get_vocab()) == 12
    assert (
        model.generate(
            **words("<s> two one", return_tensors="pt", return_token_type_ids=False), max_new_tokens=2
        ).shape[0]
        == 1
    )


def test_a_vocabulary_is_built_the_same_way_every_time(load, tmp_path):
    for out in ("one", "two"):
        checkpoint.merge(load(SOUP + "tokenizer_source: union"), tmp_path / out, "recipe.yaml")
    names = [{file.name for file in (tmp_path / out).iterdir()} for out in ("one", "two")]
    assert names[0] == names[1]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names[0])


def test_a_token_that_no_model_has_is_told_of(load, tmp_path):
    told: list[str] = []
    text = SOUP + "tokenizer: {source: base, tokens: {<mine>: {}, <zero>: {source: {kind: zero}}}}"
    checkpoint.merge(load(text), tmp_path / "out", "recipe.yaml", warn=told.append)
    assert [line for line in told if "<mine>" in line and "zeros" in line]
    assert not [line for line in told if "<zero>" in line]


SAID = "{{ messages[0]['content'] }}"
WRITTEN = [("auto", TEMPLATE), ("$C", TEMPLATE), (SAID, SAID), ("chatml", CHAT_TEMPLATES["chatml"])]


@pytest.mark.parametrize("tokens", ["", "tokenizer_source: union"])
@pytest.mark.parametrize(
    ("written", "read"), [("auto", TEMPLATE), ("$C", TEMPLATE), (SAID, SAID), ("chatml", CHAT_TEMPLATES["chatml"])]
)
def test_the_tokenizer_gets_the_chat_template(written, read, tokens, load, tmp_path):
    models_merged = "$B" if tokens else "$C"
    text = f"{{merge_method: linear, base_model: $C, models: [{{model: {models_merged}}}], parameters: {{weight: 1}}}}"
    keys = {"chat_template": written, **yaml.safe_load(tokens or "{}")}
    document = yaml.safe_load(text) | keys
    checkpoint.merge(load(yaml.safe_dump(document)), tmp_path / "out", "recipe.yaml")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == read


REFUSED = {
    "no word on tokens": ("", r"embed_tokens.weight of .*B has shape \[12, 8\], .* \[9, 8\]; say whose tokens"),
    "a template by no known name": (
        "tokenizer_source: base\nchat_template: chatlm",
        "chat_template is 'chatlm', no known format; did you mean 'chatml'",
    ),
    "a model without a template": ("tokenizer_source: base\nchat_template: $A", "A has no chat template; name another"),
    "a token that its source lacks": (
        "tokenizer: {tokens: {eight: {source: $A}}}",
        r"tokenizer\.tokens\['eight'\]\.source: .*A has no token 'eight'",
    ),
    "a source that is not merged": (
        "tokenizer: {tokens: {one: {source: D}}}",
        r"tokenizer\.tokens\['one'\]\.source names D, no model of the recipe",
    ),
    "a row that its source lacks": (
        "tokenizer: {tokens: {<x>: {source: {kind: model_token, model: $A, token_id: 9}}}}",
        r"tokenizer\.tokens\['<x>'\]\.source names row 9 of .*A, which has 9",
    ),
    "no such tokenizer": ("tokenizer_source: ./nowhere", "nowhere: no such model folder"),
}


@pytest.mark.parametrize(("keys", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_vocabulary_is_refused_with(keys, message, load, tmp_path):
    with pytest.raises(InputError, match=message):
        checkpoint.merge(load(SOUP + keys), tmp_path / "out", "recipe.yaml")
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_model_in_memory_keeps_the_base_s_tokens(load, models):
    resident = load_models({str(models["A"]): models["A"]}, models["A"], "cpu", "float32")
    alone = "{merge_method: passthrough, models: [{model: $A}], tokenizer_source: %s}"
    with pytest.raises(InputError, match="builds a tokenizer"):
        resident.materialize(load(alone % "union"))
    assert resident.materialize(load(alone % "base")) == resident.materialize(recipes.single(str(models["A"])))
