"""Sources: where a reference leads, what the headers say, and what is refused before a weight is read."""

import fnmatch
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evomerge import zoo
from evomerge.errors import InputError
from evomerge.merging.sources import tensor_files
from evomerge.merging.sources.references import ModelSource, locate, pinned
from evomerge.merging.sources.weights import load_tensors, model_config, tensor_table
from evomerge.recipe import single
from evomerge.search.preparation import prepare_file
from tests.models import check_models, load_models

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_models, tmp_path) -> Path:
    """A copy of a fine-tune, to be broken."""
    return Path(shutil.copytree(tiny_models["first"], tmp_path / "model"))


@pytest.fixture
def sharded(tiny_models, tmp_path) -> Path:
    """The same model in several files."""
    path = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_models["first"]).save_pretrained(path, max_shard_size="20KB")
    return path


@pytest.fixture
def rewrite(folder) -> Callable[..., Path]:
    """The copy with its tensors changed by a function."""

    def write(change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        return folder

    return write


def check(tiny_models: dict[str, Path], folder: Path) -> None:
    check_models(str(tiny_models["base"]), {"models.mine (here)": str(folder)})


# locate


def test_a_folder_is_where_it_says(tiny_models, monkeypatch):
    assert locate(str(tiny_models["first"])) == tiny_models["first"]
    monkeypatch.chdir(tiny_models["first"].parent)
    assert locate("./first").resolve() == locate("first").resolve() == tiny_models["first"].resolve()
    monkeypatch.setenv("HOME", str(tiny_models["first"].parent))
    assert locate("~/first") == tiny_models["first"]


@pytest.mark.parametrize("name", zoo.names())
def test_a_zoo_model_comes_with_the_package(name):
    assert locate(f"zoo:{name}") == zoo.path(name)


@pytest.mark.parametrize("reference", ["./nowhere", "../nowhere", "/nowhere", "~/nowhere", "nowhere", "a/b/c", "./a/b"])
def test_a_missing_folder_is_an_input_error_that_says_what_may_stand_there(reference):
    with pytest.raises(InputError, match=rf"^{reference}: no such model folder; .*owner/name.*zoo:NAME \(base, lang"):
        locate(reference)


def test_an_unknown_zoo_model_and_a_file_are_input_errors(folder):
    with pytest.raises(InputError, match="did you mean 'math'"):
        locate("zoo:maths")
    with pytest.raises(InputError, match=r"expected a model folder, got a file"):
        locate(str(folder / WEIGHTS))


def test_an_unreachable_hub_is_an_input_error():
    """The tests run with the hub switched off."""
    with pytest.raises(
        InputError, match=r"^nobody/nothing: no such folder here, and the Hugging Face hub gave no such"
    ):
        locate("nobody/nothing")


def test_a_hub_model_is_downloaded_at_its_revision_and_without_pickles(monkeypatch, tmp_path):
    asked: dict[str, Any] = {}

    def download(identifier: str, **options: Any) -> str:
        asked.update(options, identifier=identifier)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("owner/name") == tmp_path
    assert (asked["identifier"], asked["revision"]) == ("owner/name", None)
    assert locate("owner/name@v1") == tmp_path
    assert (asked["identifier"], asked["revision"]) == ("owner/name", "v1")
    wanted = {
        name
        for name in ("model.safetensors", INDEX, "config.json", "merges.txt", "tokenizer.model", "chat_template.jinja")
        if any(fnmatch.fnmatch(name, pattern) for pattern in asked["allow_patterns"])
    }
    assert len(wanted) == 6
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "modeling.py", "training_args.bin"):
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in asked["allow_patterns"])


def test_a_revision_may_have_slashes(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda identifier, **options: str(tmp_path))
    assert locate("owner/name@refs/pr/3") == tmp_path


def test_a_search_is_resolved_to_the_commits_of_its_models(monkeypatch, tmp_path, search_file):
    commits = {(None, "math"): "a1", ("main", "math"): "a1", ("v2", "lang"): "b2"}
    for commit, name in {(commit, name) for (_, name), commit in commits.items()}:
        shutil.copytree(zoo.path(name), tmp_path / "hub" / name / "snapshots" / commit)

    asked = []

    def download(identifier: str, revision: str | None, **_: Any) -> str:
        name = identifier.removeprefix("owner/")
        asked.append((name, revision))
        return str(tmp_path / "hub" / name / "snapshots" / commits.get((revision, name), revision or ""))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    both = ModelSource(locate("owner/math"), locate("owner/lang@v2"))
    assert pinned("owner/math+owner/lang@v2", both) == "owner/math@a1+owner/lang@b2"
    assert pinned("zoo:base", ModelSource(locate("zoo:base"))) == "zoo:base"
    assert pinned(str(both.folder), ModelSource(both.folder)) == str(both.folder)
    asked.clear()
    config = prepare_file(search_file(models={"math": "owner/math", "lang": "owner/lang@v2"})).config
    assert (config.base, config.models) == ("zoo:base", {"math": "owner/math@a1", "lang": "owner/lang@b2"})
    assert sorted(asked) == [("lang", "v2"), ("math", None)]  # once each
    with pytest.raises(InputError, match=r"models\.two is owner/math@a1, which is models\.one too"):
        prepare_file(search_file(models={"one": "owner/math", "two": "owner/math@main"}))


# What a good folder holds


def test_the_table_says_what_the_file_holds(folder):
    tensors = load_file(folder / WEIGHTS)
    table = tensor_table(folder)
    assert table.keys() == tensors.keys()
    assert {name: info.shape for name, info in table.items()} == {name: tuple(t.shape) for name, t in tensors.items()}
    assert {tensor_files.FLOATS[info.dtype] for info in table.values()} == {"float32"}
    assert {info.file for info in table.values()} == {folder / WEIGHTS}


def test_no_weight_is_read_for_a_table(folder):
    """The values may be anything as long as the file has its length."""
    before = tensor_table(folder)
    length = struct.unpack("<Q", (folder / WEIGHTS).read_bytes()[:8])[0]
    size = (folder / WEIGHTS).stat().st_size
    with (folder / WEIGHTS).open("r+b") as stream:
        stream.truncate(8 + length)
        stream.truncate(size)
    assert tensor_table(folder) == before


def test_a_sharded_model_is_read_like_a_whole_one(folder, sharded, tiny_models):
    assert len(list(sharded.glob("*.safetensors"))) > 3
    whole, parts = tensor_table(folder), tensor_table(sharded)
    assert {name: (info.dtype, info.shape) for name, info in parts.items()} == {
        name: (info.dtype, info.shape) for name, info in whole.items()
    }
    a, b = load_tensors(folder), load_tensors(sharded)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    check(tiny_models, sharded)
    models = load_models({"whole": folder, "parts": sharded}, sharded, "cpu", "float32")
    assert models.materialize(single("whole")) == models.materialize(single("parts"))


def test_fine_tunes_of_one_base_pass(tiny_models):
    models = {name: str(path) for name, path in tiny_models.items() if name != "base"}
    check_models(str(tiny_models["base"]), models)
    check_models("zoo:base", {"math": "zoo:math", "lang": "zoo:lang"})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_fine_tunes_may_be_stored_in_any_floating_point(dtype, rewrite, tiny_models):
    folder = rewrite(lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    check(tiny_models, folder)
    assert {tensor.dtype for tensor in load_tensors(folder).values()} == {dtype}


# config.json


def test_a_missing_config_is_named(folder, tiny_models):
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"/model: config\.json is missing"):
        check(tiny_models, folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not readable as JSON"), ("[]", "model_type is missing"), ("{}", "model_type is missing")],
)
def test_a_broken_config_is_named(text, message, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=rf"config\.json: {message}"):
        model_config(folder)


# Weights that are not safetensors, or not whole


class Bomb:
    """A pickle that leaves a file behind when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_pickled_weights_are_refused_and_never_opened(folder, tiny_models, tmp_path):
    (folder / WEIGHTS).unlink()
    mark = tmp_path / "opened"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(InputError, match=r"weights are pickled \(pytorch_model\.bin\).*convert them to safetensors"):
        check(tiny_models, folder)
    with pytest.raises(InputError, match="weights are pickled"):
        load_models({"models.mine (here)": folder}, folder, "cpu", "float32")
    assert not mark.exists()


def test_pickles_beside_safetensors_are_left_alone(folder, tiny_models, tmp_path):
    mark = tmp_path / "opened"
    (folder / "training_args.bin").write_bytes(pickle.dumps(Bomb(mark)))
    check(tiny_models, folder)
    load_models({"models.mine (here)": folder}, folder, "cpu", "float32")
    assert not mark.exists()


def test_a_folder_without_weights_is_named(folder, tiny_models):
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"/model: holds no model\.safetensors"):
        check(tiny_models, folder)


def file_of(header: Any, data: bytes = b"\0\0\0\0", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes: Any) -> dict[str, Any]:
    content = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes
    return {"tensor": {key: value for key, value in content.items() if value is not None}}


def test_the_smallest_file_is_read(folder):
    (folder / WEIGHTS).write_bytes(file_of(entry() | {"__metadata__": {"format": "pt"}}))
    assert list(tensor_table(folder)) == ["tensor"]


BROKEN = {
    "nothing in it": b"",
    "less than a length": b"\1\0\0",
    "a length without end": file_of({}, length=2**40),
    "half a header": file_of(entry(), length=20),
    "a header longer than the file": file_of(entry(), length=2000),
    "no JSON": file_of(b"not json"),
    "no UTF-8": file_of(b'{"\xff\xfe": 1}'),
    "a list for a header": file_of([1, 2]),
    "a number for a tensor": file_of({"tensor": 4}),
    "no offsets": file_of(entry(data_offsets=None)),
    "one offset": file_of(entry(data_offsets=[4])),
    "offsets of text": file_of(entry(data_offsets=["0", "4"])),
    "no dtype": file_of(entry(dtype=None)),
    "no shape": file_of(entry(shape=None)),
    "a number for a shape": file_of(entry(shape=4)),
    "too few bytes": file_of(entry(), b"\0\0\0"),
    "too many bytes": file_of(entry(), b"\0" * 5),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_corrupt_file_is_named(content, folder, tiny_models):
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(InputError, match=r"/model/model\.safetensors: not a valid safetensors file"):
        check(tiny_models, folder)


@pytest.mark.parametrize("lost", [1, 1000])
def test_a_truncated_file_is_named_with_the_sizes(lost, folder, tiny_models):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-lost])
    with pytest.raises(InputError, match=rf"expected {len(content)} bytes, got {len(content) - lost}"):
        check(tiny_models, folder)


def test_a_header_that_lies_about_shapes_is_named_when_the_weights_are_read(folder):
    (folder / WEIGHTS).write_bytes(file_of(entry(shape=[2])))
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read"):
        load_tensors(folder)


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    content=st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["tensor", "dtype", "shape", "data_offsets"]), inner, max_size=3)
        ),
        max_leaves=9,
    ).map(lambda header: file_of(header))
)
def test_no_content_of_a_file_gets_past_as_anything_but_an_input_error(content, tmp_path):
    (tmp_path / WEIGHTS).write_bytes(content)
    try:
        assert all(isinstance(info.shape, tuple) for info in tensor_table(tmp_path).values())
    except InputError as error:
        assert str(error).startswith(str(tmp_path))  # noqa: PT017 - most examples fail, some do not


# Shards


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/shard.safetensors", "..", "", "./x.safetensors"]
)
def test_a_shard_outside_the_folder_is_refused(name, sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=rf"index\.json: shard '{name}' lies outside the model folder; refused"):
        tensor_table(sharded)


def test_a_missing_shard_is_named(sharded, tiny_models):
    missing = sorted(sharded.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(InputError, match=rf"/sharded: shard {missing.name} named by .*index\.json is missing"):
        check(tiny_models, sharded)


def test_a_truncated_shard_is_named(sharded, tiny_models):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(InputError, match=rf"/sharded/{shard.name}: not a valid safetensors file"):
        check(tiny_models, sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', "[1]", "null"])
def test_a_broken_index_is_named(text, sharded):
    (sharded / INDEX).write_text(text)
    with pytest.raises(InputError, match=r"index\.json: not a readable safetensors index"):
        tensor_table(sharded)


@pytest.mark.parametrize("name", [5, None, ["a"], {"a": 1}])
def test_a_shard_s_name_that_is_no_text_is_an_input_error(name, sharded):
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": name, "b": "model-00001.safetensors"}}))
    with pytest.raises(InputError, match=r"index\.json"):
        tensor_table(sharded)


# Models that do not fit


def test_another_architecture_is_refused(folder, tiny_models):
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "mistral"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"^models\.mine \(.*\) is a mistral model, but the base .* is a llama model"):
        check(tiny_models, folder)


def test_another_shape_is_refused(rewrite, tiny_models):
    folder = rewrite(lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(130, 32)}))
    with pytest.raises(
        InputError, match=r"^models\.mine .*embed_tokens\.weight has shape \[130, 32\], .* has \[128, 32\]"
    ):
        check(tiny_models, folder)


def test_a_missing_tensor_is_refused(rewrite, tiny_models):
    folder = rewrite(lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(InputError, match=r"^models\.mine .* lacks the tensor lm_head\.weight of the base"):
        check(tiny_models, folder)


def test_an_extra_tensor_is_refused(rewrite, tiny_models):
    folder = rewrite(lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.lora_A": torch.zeros(2)}))
    with pytest.raises(
        InputError, match=r"^models\.mine .* has the tensor model\.layers\.0\.mlp\.up_proj\.lora_A, which"
    ):
        check(tiny_models, folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(dtype, rewrite, tiny_models):
    name = "model.layers.0.mlp.up_proj.weight"
    folder = rewrite(lambda tensors: tensors.update({name: torch.zeros(48, 32).to(dtype)}))
    with pytest.raises(InputError, match=rf"{name} is stored as \w+; only floating-point weights .* dequantize"):
        check(tiny_models, folder)
    with pytest.raises(InputError, match="dequantize"):
        check_models(str(folder), {})


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
def test_sources_on_the_cpu_are_mapped_so_that_workers_of_one_node_share_their_pages() -> None:
    def mapped_file(tensor: torch.Tensor) -> str:
        for line in Path("/proc/self/maps").read_text().splitlines():
            first, last = (int(bound, 16) for bound in line.split()[0].split("-"))
            if first <= tensor.data_ptr() < last:
                return line.split()[-1]
        return ""

    file = str(zoo.path("math") / "model.safetensors")
    assert {mapped_file(tensor) for tensor in load_tensors(zoo.path("math")).values()} == {file}


def test_pieces_whose_elements_follow_one_another_are_mapped_like_whole_tensors(tmp_path):
    whole, file = torch.arange(96.0).view(2, 12, 4), tmp_path / "model.safetensors"
    save_file({"before": torch.ones(3), "whole": whole}, file)
    views = [whole[1], whole[1, 3:7], whole[1:, 2:5], whole[:, 2:5], whole[1].T, whole[0, :, 1:3]]
    for view in views:
        shape = tuple(view.shape)
        piece = tensor_files.Piece("whole", shape, view.stride(), view.storage_offset(), whole=False)
        mapped = tensor_files.MappedFiles().find(tensor_files.TensorInfo(file, "F32", shape, "whole", piece))
        assert (mapped is not None) == view.is_contiguous()
        assert mapped is None or torch.equal(mapped.tensor, view)
    assert [view.is_contiguous() for view in views].count(True) == 3
