"""Fixtures: tiny random models to merge, small searches over them and over the zoo, and what refuses bad input."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for each other take several times the processor time
os.environ.setdefault("RAY_worker_niceness", "0")  # beside other work, Ray's 15 would make a test wait for minutes
# Ray reads once in a process whether it asks for tokens, and searches started here do ask.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}

import copy
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import settings

from evomerge import cli, zoo
from evomerge.events import unheard
from tests.bad_input import Refuses, check_sentence, contents
from tests.searches import WriteSearch, put, small_search, tiny_search

REPOSITORY = Path(__file__).parent.parent

settings.register_profile("suite", deadline=None, derandomize=True)  # the machine's load must decide nothing
settings.load_profile("suite")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what takes minutes to hours, unless -m asks for it."""
    if "exhaustive" in str(config.getoption("-m")):
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", autouse=True)
def migrations_read_once() -> Iterator[None]:
    """Optuna reads its scripts for old databases whenever it opens one, which takes longer than to make one."""
    from optuna.storages._rdb import storage

    read: dict[str, Any] = {}
    make = storage._VersionManager._create_alembic_script
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            storage._VersionManager,
            "_create_alembic_script",
            lambda manager: read["scripts"] if read else read.setdefault("scripts", make(manager)),
        )
        yield


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and three fine-tunes: Llamas of 4 layers, 32 wide, float32, random weights, with the zoo's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folders = {}
    for seed, name in enumerate(("base", "first", "second", "third")):
        generator = torch.Generator().manual_seed(seed)
        drift = {
            key: value + (0.02 * torch.randn(value.shape, generator=generator) if seed else 0)
            for key, value in start.items()
        }
        model.load_state_dict(drift)
        folders[name] = root / name
        model.save_pretrained(folders[name])
        for file in zoo.path("base").glob("tokenizer*"):
            shutil.copyfile(file, folders[name] / file.name)
    return folders


@pytest.fixture
def search_file(tmp_path: Path) -> WriteSearch:
    """Writes a small search over the zoo, with top-level keys replaced (None removes one)."""

    def write(name: str = "search.yaml", **changes: Any) -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(small_search(**changes)))
        return path

    return write


@pytest.fixture
def search(tiny_models: dict[str, Path], tmp_path: Path) -> WriteSearch:
    """Writes a small search over the tiny models, with dotted keys changed."""

    def write(changes: dict[str, Any] | None = None) -> Path:
        content = tiny_search(tiny_models)
        for key, value in (changes or {}).items():
            put(content, key, copy.deepcopy(value))
        path = tmp_path / "search.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


@pytest.fixture(scope="session")
def finished(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the small search over the tiny models."""
    from evomerge.runs import directory as runs

    folder = tmp_path_factory.mktemp("finished")
    (folder / "search.yaml").write_text(yaml.safe_dump(tiny_search(tiny_models)))
    runs.start(folder / "search.yaml", folder / "run", (), None, unheard)
    return folder / "run"


@pytest.fixture
def run_directory(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be spoiled."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Refuses]:
    """Calls evomerge in this process and checks what all bad input has in common."""
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)

    def refuse(*arguments: object, says: tuple[str, ...]) -> None:
        monkeypatch.setattr(sys, "argv", ["evomerge", *map(str, arguments)])
        before = contents(tmp_path)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        check_sentence(stopped.value.code, *capfd.readouterr(), says)
        assert contents(tmp_path) == before

    yield refuse
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def refuses_search(search: WriteSearch, refuses: Refuses) -> Refuses:
    """Checks that the small search with keys changed is not run, and that the sentence names its file."""

    def refuse(changes: dict[str, Any], *says: str) -> None:
        path = search(changes)
        refuses("run", path, "--output", "new/run", says=(f"evomerge: {path}: ", *says))

    return refuse
