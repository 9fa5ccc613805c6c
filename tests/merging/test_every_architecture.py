"""Every architecture that transformers can build from a config is merged and reloaded; a dozen of them always."""

from pathlib import Path

import pytest

from tests.every_architecture import Unbuilt, architectures, try_merges

pytestmark = pytest.mark.slow  # a dozen architectures are made, merged and reloaded

ALWAYS = (
    "deepseek_v3",
    "ernie4_5_moe",
    "gemma3",
    "glm4_moe",
    "granitemoe",
    "gpt_neox",
    "jamba",
    "llama",
    "llava",
    "minimax_m2",
    "mistral3",
    "phimoe",
    "qwen2_5_vl",
    "qwen3_next",
)
# what transformers itself cannot load again as it saved it, or what has no layers in the usual sense
_NOT_AS_SAVED = "transformers itself does not load what it saves of it"
UNSUPPORTED: dict[str, str] = {
    "emu3": f"{_NOT_AS_SAVED}: the type of its language model is unknown to it",
    "mllama": f"{_NOT_AS_SAVED}: the type of its language model is unknown to it",
    "shieldgemma2": f"{_NOT_AS_SAVED}: the names of its tensors are others",
}


@pytest.mark.parametrize("kind", ALWAYS)
def test_merges_are_written_scored_and_reloaded_alike(kind: str, tmp_path: Path) -> None:
    assert try_merges(kind, tmp_path).runs


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", architectures())
def test_merges_of_every_architecture_are_written_scored_and_reloaded_alike(kind: str, tmp_path: Path) -> None:
    if kind in UNSUPPORTED:
        pytest.skip(UNSUPPORTED[kind])
    try:
        try_merges(kind, tmp_path)
    except Unbuilt as error:
        pytest.skip(f"no tiny model: {error}")
