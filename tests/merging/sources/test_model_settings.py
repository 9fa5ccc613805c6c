"""Settings: what configs say beyond shapes is compared with the architecture's defaults, and named with both values."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from evomerge import recipe, zoo
from evomerge.errors import InputError
from evomerge.export import checkpoint
from evomerge.merging.sources.model_settings import check_settings
from evomerge.search.preparation import prepare_file, summarize
from tests.searches import WriteSearch


def warning(kind: str, mine: dict[str, Any], base: dict[str, Any]) -> str | None:
    return check_settings("models.mine", {"model_type": kind} | mine, "base", {"model_type": kind} | base)


@pytest.mark.parametrize(
    ("kind", "mine", "base", "told"),
    [
        ("llama", {"rope_theta": 5e5}, {"rope_theta": 1e4}, "rope_theta is 500000.0, the base's 10000.0"),
        ("llama", {"rope_theta": 5e5}, {}, "rope_theta is 500000.0, the base's 10000.0"),
        ("llama", {"rms_norm_eps": 1e-5}, {}, "rms_norm_eps is 1e-05, the base's 1e-06"),
        ("llama", {"tie_word_embeddings": True}, {}, "tie_word_embeddings is True, the base's False"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, {}, "factor is 2.0, the base's unset"),
        ("mistral", {"sliding_window": None}, {"sliding_window": 4096}, "sliding_window is unset, the base's 4096"),
        ("gemma2", {"final_logit_softcapping": 50.0}, {}, "final_logit_softcapping is 50.0, the base's 30.0"),
        ("gpt_neox", {"use_parallel_residual": False}, {}, "use_parallel_residual is False, the base's True"),
        ("gpt2", {"layer_norm_epsilon": 1e-6}, {}, "layer_norm_epsilon is 1e-06, the base's 1e-05"),
        ("mixtral", {"num_experts_per_tok": 1}, {}, "num_experts_per_tok is 1, the base's 2"),
    ],
)
def test_a_setting_that_changes_what_the_weights_compute_is_named_with_both_values(kind, mine, base, told):
    found = warning(kind, mine, base)
    assert found is not None
    assert told in found
    assert found.startswith("models.mine: its config.json differs from that of the base (base), whose values every")


@pytest.mark.parametrize(
    ("mine", "base"),
    [
        ({"rope_theta": 1e4, "rms_norm_eps": 1e-6}, {}),
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
        ({"max_position_embeddings": 4096, "use_cache": False, "eos_token_id": 7, "dtype": "float16"}, {}),
    ],
)
def test_defaults_spelled_out_older_spellings_and_other_bookkeeping_are_no_difference(mine, base):
    assert warning("llama", mine, base) is None


def test_another_number_of_heads_is_refused_and_never_a_mere_warning():
    with pytest.raises(InputError, match=r"^models\.mine: num_attention_heads in config\.json is 8, but the base"):
        warning("llama", {"num_attention_heads": 8, "rope_theta": 5e5}, {"num_attention_heads": 4})


def tuned(folder: Path, out: Path, **settings: Any) -> Path:
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | settings))
    return out


def test_a_merge_says_whose_settings_it_has(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    other = tuned(tiny_models["first"], tmp_path / "other", rms_norm_eps=0.125)
    base = str(tiny_models["base"])
    file = tmp_path / "recipe.yaml"
    model = {"model": str(other), "parameters": {"weight": 1.0}}
    file.write_text(json.dumps({"merge_method": "task_arithmetic", "base_model": base, "models": [model]}))
    told: list[str] = []
    checkpoint.merge(recipe.load(file), tmp_path / "out", str(file), warn=told.append)
    assert [each for each in told if "rms_norm_eps is 0.125" in each]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rms_norm_eps"] == json.loads((tiny_models["base"] / "config.json").read_text())["rms_norm_eps"]


def test_a_search_is_checked_with_the_warning(search_file: WriteSearch, tmp_path: Path) -> None:
    other = tuned(zoo.path("math"), tmp_path / "other", rms_norm_eps=0.125)
    found = summarize(prepare_file(search_file(models={"math": str(other)})))["warnings"]
    assert [each for each in found if each.startswith("models.math") and "rms_norm_eps is 0.125" in each]
