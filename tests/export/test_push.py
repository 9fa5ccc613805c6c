"""A checkpoint goes to the hub as it is, with nothing else and no path of this machine, or it is told why not."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars  # type: ignore[attr-defined]

from evomerge import recipe as recipes
from evomerge.export import checkpoint
from evomerge.recipe import Provenance
from tests.bad_input import Refuses
from tests.commands import evomerge
from tests.fake_hub import READER, WRITER, FakeHub, Repository, serving

NAME = "someone/merged"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the hub's client about itself


@pytest.fixture(scope="module")
def original(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of a local model and of one with an alias on the hub, in two files of weights."""
    folder = tmp_path_factory.mktemp("push") / "merged"
    first, second = str(tiny_models["first"]), str(tiny_models["second"])
    recipe = recipes.linear({first: 0.5, second: 0.5}).model_copy(
        update={"evomerge": Provenance(aliases={second: "lab/second-1b@abc"})}
    )
    checkpoint.merge(recipe, folder, "recipe.yaml", shard_size="60KB")
    return folder


@pytest.fixture
def merged(original: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be spoiled."""
    return Path(shutil.copytree(original, tmp_path / "merged"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub to which somebody with the right to write is logged in."""
    with serving() as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        huggingface_hub.close_session()
        disable_progress_bars()
        yield made
        enable_progress_bars()
        huggingface_hub.close_session()


def test_a_checkpoint_arrives_byte_for_byte_and_private(merged: Path, hub: FakeHub) -> None:
    shown = evomerge("push", merged, NAME)
    repository = hub.repositories[NAME]
    assert repository.private
    files = repository.branches["main"]
    own = {path.name for path in merged.iterdir()}
    assert set(files) == own | {".gitattributes"}
    assert sum(name.endswith(".safetensors") for name in files) > 1
    for name in own - {"README.md", "evomerge_recipe.yaml"}:
        assert files[name] == (merged / name).read_bytes(), name
        assert f"  {name}  " in shown
    assert set(hub.stored.values()) == {path.read_bytes() for path in merged.glob("*.safetensors")}


def test_a_process_with_the_hub_s_own_settings_uploads_too(merged: Path) -> None:
    with serving() as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "evomerge", "push", str(merged), NAME, "--public", "--message", "First"]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert not hub.repositories[NAME].private
        assert hub.repositories[NAME].messages == ["main: First"]
        assert WRITER not in done.stdout + done.stderr


def test_what_arrives_names_no_path_of_this_machine(merged: Path, hub: FakeHub, tiny_models: dict[str, Path]) -> None:
    first, second = str(tiny_models["first"]), str(tiny_models["second"])
    (merged / "report.md").write_text(f"Merged from {first} and {second}.\n")
    (merged / "README.md").write_text((merged / "README.md").read_text() + f"\nSee {second}/config.json.\n")
    evomerge("push", merged, NAME)
    files = hub.repositories[NAME].branches["main"]
    for name in ("README.md", "evomerge_recipe.yaml", "report.md"):
        assert str(tiny_models["first"].parent) not in files[name].decode(), name
    front = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert front["base_model"] == ["lab/second-1b"]
    assert files["report.md"].decode() == "Merged from first and lab/second-1b@abc.\n"
    assert yaml.safe_load(files["evomerge_recipe.yaml"])["models"][1]["model"] == "lab/second-1b@abc"


def test_a_checkpoint_without_a_card_gets_one(merged: Path, hub: FakeHub) -> None:
    (merged / "README.md").unlink()
    evomerge("push", merged, NAME)
    assert "# Merged model" in hub.repositories[NAME].branches["main"]["README.md"].decode()


def test_nothing_that_is_no_part_of_the_checkpoint_goes(merged: Path, hub: FakeHub) -> None:
    for name in ("secrets.txt", ".env", "optimizer.pt", "other.safetensors"):
        (merged / name).write_text("kept here")
    (merged / "runs").mkdir()
    (merged / "runs" / "archive.db").write_text("kept here")
    (merged / "LICENSE").write_text("anyone may do anything")
    shown = evomerge("push", merged, NAME)
    files = hub.repositories[NAME].branches["main"]
    assert not {"secrets.txt", ".env", "optimizer.pt", "other.safetensors", "runs/archive.db"} & set(files)
    assert b"kept here" not in b"".join(files.values())
    assert "not uploaded: .env, optimizer.pt, other.safetensors, runs, secrets.txt" in shown
    assert files["LICENSE"] == b"anyone may do anything"


def test_a_branch_is_made_and_main_stays_as_it_is(merged: Path, hub: FakeHub) -> None:
    hub.repositories[NAME] = Repository(True, {"main": {"README.md": b"# Mine"}})
    for _ in range(2):
        evomerge("push", merged, NAME, "--revision", "v2")
    assert hub.repositories[NAME].branches["main"] == {"README.md": b"# Mine"}
    assert "config.json" in hub.repositories[NAME].branches["v2"]


def refused(folder: Path, *fragments: str, status: int = 2, options: tuple[str, ...] = ()) -> None:
    """Checks that a push fails with one sentence."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        evomerge("push", folder, NAME, *options, status=status)
    lines = errors.getvalue().splitlines()
    assert len(lines) == 1, lines
    for fragment in fragments:
        assert fragment in lines[0], lines[0]


def test_an_upload_that_was_cut_short_can_be_done_again(merged: Path, hub: FakeHub) -> None:
    hub.refuse["/large/"] = (418, "out of order")
    refused(merged, f"{NAME}: the hub answered 418 (the hub says: out of order)", status=1)
    hub.refuse.clear()
    evomerge("push", merged, NAME)
    assert "config.json" in hub.repositories[NAME].branches["main"]


def test_a_name_that_is_taken_is_told(merged: Path, hub: FakeHub) -> None:
    evomerge("push", merged, NAME)
    before = dict(hub.repositories[NAME].branches["main"])
    refused(merged, f"{NAME}: this name is taken", "--revision")
    assert hub.repositories[NAME].branches["main"] == before


def test_what_should_be_private_goes_to_no_public_repository(merged: Path, hub: FakeHub) -> None:
    hub.repositories[NAME] = Repository(private=False)
    refused(merged, "everyone may see this repository", "--public")
    refused(merged, "everyone may see this repository", options=("--revision", "v2"))
    assert list(hub.repositories[NAME].branches) == ["main"]
    evomerge("push", merged, NAME, "--public")


def test_a_login_that_is_missing_unknown_or_too_weak_is_told(
    merged: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)
    refused(merged, "the login may not write there", "don't have the rights to create a model")
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    refused(merged, "the hub does not know the login", "`hf auth login`")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    refused(merged, "log in with `hf auth login`, or set HF_TOKEN")
    assert not hub.repositories


def test_a_hub_that_is_not_reached_is_told(merged: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    refused(merged, f"{NAME}: the hub cannot be reached", "HF_HUB_OFFLINE", status=1)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    huggingface_hub.close_session()
    refused(merged, f"{NAME}: the hub cannot be reached (ConnectError", status=1)


def test_files_that_the_hub_leaves_out_are_told(merged: Path, hub: FakeHub) -> None:
    hub.ignored.add("config.json")
    refused(merged, f"{NAME}: the hub did not keep config.json", status=1)


def test_other_weights_than_the_recipe_s_are_not_uploaded(merged: Path, hub: FakeHub) -> None:
    path = sorted(merged.glob("*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused(merged, f"{merged}: the weights have fingerprint", "nothing was uploaded", status=1)
    assert not hub.requests


def test_a_folder_that_is_no_merge_is_refused(merged: Path, refuses: Refuses) -> None:
    path = merged / "evomerge_recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["evomerge"].pop("fingerprint")
    path.write_text(yaml.safe_dump(recipe))
    refuses("push", merged, NAME, says=(f"{path}: evomerge.fingerprint is missing",))
    path.unlink()
    refuses("push", merged, NAME, says=(f"{merged}: evomerge_recipe.yaml is missing",))
    refuses("push", merged / "nowhere", NAME, says=("evomerge_recipe.yaml is missing",))


def test_nothing_from_outside_the_folder_is_uploaded(merged: Path, tmp_path: Path, refuses: Refuses) -> None:
    outside = tmp_path / "outside.json"
    (merged / "config.json").rename(outside)
    (merged / "config.json").symlink_to(outside)
    refuses("push", merged, NAME, says=(f"{merged / 'config.json'}: this leads out of the folder",))
    outside.rename(merged / "config.json")
    index = merged / "model.safetensors.index.json"
    for name in ("../outside.safetensors", "/etc/passwd", "notes.txt"):
        index.write_text(f'{{"weight_map": {{"lm_head.weight": "{name}"}}}}')
        refuses("push", merged, NAME, says=(f"{index}: {name} is no file of safetensors in the folder",))


def test_a_card_that_is_no_text_is_refused_before_anything_is_made(merged: Path, hub: FakeHub) -> None:
    (merged / "README.md").write_bytes(b"\xff\xfe")
    refused(merged, f"{merged / 'README.md'}: not text in UTF-8")
    assert not hub.requests


@pytest.mark.parametrize("name", ["merged", "a/b/c", "a/", "../b", "a b/c", "a/b..c", "a/b--c"])
def test_a_name_that_no_repository_can_have_is_refused(name: str, refuses: Refuses) -> None:
    refuses("push", "folder", name, says=(f"'{name}' is no name of a repository; write OWNER/NAME",))
