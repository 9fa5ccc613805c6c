"""Source: a model taken into a search, read from safetensors only.

`find_source` turns a reference into a folder with the adapters that change it: `zoo:math`, a folder, a Hugging Face
id, each with `@REVISION` and `+ADAPTER` where wanted, or an adapter's folder, which stands for the base with it.
`tensor_table` reads names, shapes and dtypes from the file headers alone; `preflight` compares them before any weight
is read; `Weights` reads one tensor at a time. Pickled weights are never opened.

Tensors go by the names that transformers would write for the whole model (`naming`), whatever a checkpoint calls them;
buffers that old checkpoints hold, and heads that are stored though the config ties them to the embedding, are left out.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge import zoo
from evomerge.errors import InputError, choices
from evomerge.merging.adapters import CONFIG as ADAPTER_CONFIG
from evomerge.merging.adapters import WEIGHTS as ADAPTER_WEIGHTS
from evomerge.merging.adapters import Adapter, is_adapter, load_adapter
from evomerge.merging.settings import check_settings
from evomerge.merging.tensor_files import FLOATS as FLOATS
from evomerge.merging.tensor_files import TensorFiles, read_header
from evomerge.merging.tensor_files import TensorInfo as TensorInfo
from evomerge.recipe import load as load_recipe
from evomerge.seen import Digests

if TYPE_CHECKING:
    import torch

    from evomerge.merging.naming import Naming
    from evomerge.merging.tensor_files import Piece

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
RECIPE = "evomerge_recipe.yaml"  # beside the weights of a merge
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONV1D = ("gpt2", "openai-gpt")  # architectures whose layers store their weights as (in, out)
HEAD_NAMES = ("lm_head.weight", "embed_out.weight")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings)\.weight$")
_SAMPLE = 1 << 20
_BUFFER = re.compile(r"\.(?:attn|attention)\.(?:bias|masked_bias)$|\.rotary_emb\.\w+$")
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model folder, and the folder of an adapter that is merged into it on reading."""

    folder: Path
    adapter: Path | None = None

    def __str__(self) -> str:
        return str(self.folder) if self.adapter is None else f"{self.folder}+{self.adapter}"


def find_source(reference: str, base: str) -> ModelSource:
    """The source of a model reference. Raises InputError where there is none.

    base: the reference that an adapter named by itself is taken to change.
    """
    model, adapter = split_adapter(reference)
    folder = locate(model)
    if not is_adapter(folder):
        return ModelSource(folder, _adapter_folder(adapter) if adapter else None)
    if adapter or base == reference:
        raise InputError(
            f"{model} is an adapter, not a model; name the model that it changes before it (MODEL+{model})."
        )
    if split_adapter(base)[1]:
        raise InputError(
            f"{model} is an adapter, and the base ({base}) has one already; name the model that it changes before it "
            f"(MODEL+{model})."
        )
    return ModelSource(locate(base), folder)


def split_adapter(reference: str) -> tuple[str, str | None]:
    """`MODEL+ADAPTER` taken apart; a folder that has a plus in its name is one model."""
    if "+" not in reference or Path(reference).expanduser().is_dir():
        return reference, None
    model, _, adapter = reference.partition("+")
    if not model or not adapter or "+" in adapter:
        raise InputError(f"{reference}: expected MODEL+ADAPTER, one of each.")
    return model, adapter


def pinned(reference: str) -> str:
    """The reference, with the commit that a Hugging Face id stands for now in place of its revision."""
    model, adapter = split_adapter(reference)
    if adapter:
        return f"{pinned(model)}+{pinned(adapter)}"
    folder = locate(model)
    downloaded = folder.parent.name == "snapshots" and not Path(model).expanduser().exists()
    return f"{model.partition('@')[0]}@{folder.name}" if downloaded else reference


def _adapter_folder(reference: str) -> Path:
    folder = locate(reference)
    if not (folder / ADAPTER_CONFIG).exists():
        raise InputError(
            f"{reference}: {ADAPTER_CONFIG} is missing; only a LoRA as PEFT saves it can follow a plus sign."
        )
    return folder


def locate(reference: str) -> Path:
    """The folder of one model or adapter. Raises InputError where there is none."""
    if reference.startswith("zoo:"):
        return zoo.path(reference.removeprefix("zoo:"))
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{reference}: expected a model folder, got a file; name the folder that holds config.json.")
    if reference.startswith((".", "/", "~")) or reference.partition("@")[0].count("/") != 1:
        raise InputError(
            f"{reference}: no such model folder; give a folder, a Hugging Face id (owner/name) or zoo:NAME "
            f"({', '.join(zoo.names())})."
        )
    return _download(reference)


def _download(reference: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    identifier, _, revision = reference.partition("@")
    try:
        return Path(snapshot_download(identifier, revision=revision or None, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise InputError(
            f"{reference}: no such folder here, and the Hugging Face hub gave no such model ({reason}); "
            "check the name, or the network."
        ) from None


def seen_by(source: ModelSource) -> Digests:
    """What the search saw that made a model, as the recipe beside its weights says; nothing where there is none."""
    folders = [source.folder] if source.adapter is None else [source.folder, source.adapter]
    recipes = [load_recipe(folder / RECIPE) for folder in folders if (folder / RECIPE).is_file()]
    return frozenset().union(*(recipe.evomerge.digests for recipe in recipes))


def model_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder}: config.json is missing; a model folder holds config.json and weights.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); repair or download it again.") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"{path}: model_type is missing; expected the config.json of a Hugging Face model.")
    return config


def tensor_table(source: ModelSource | Path) -> dict[str, TensorInfo]:
    """Every tensor of a source by name, from the safetensors headers."""
    return Weights(source).table


class Weights:
    """The tensors of a source, read one at a time, adapters merged in.

    table: every tensor's name, with the dtype and shape that `read` gives it.
    """

    def __init__(self, source: ModelSource | Path) -> None:
        """Reads the headers, no values."""
        self.source = source if isinstance(source, ModelSource) else ModelSource(source)
        self._files = TensorFiles()
        self._stored = self.table = _model_table(self.source.folder)
        self._adapter: Adapter | None = None
        if self.source.adapter is not None:
            kind = model_config(self.source.folder)["model_type"]
            naming = _naming(self.source.folder)
            renamed = {held: name for name, held in naming.whole.items() if held != name} if naming else {}
            tied = self._tied(renamed.get(HEAD_NAMES[0], HEAD_NAMES[0]))
            self._adapter = load_adapter(self.source.adapter, self._stored, renamed, kind in CONV1D, tied)
            if self._adapter.head is not None and tied is not None:
                self._stored = {**self._stored, tied[0]: self._stored[tied[1]]}
            self.table = self._adapter.adapt_table(self._stored)

    @property
    def replaced(self) -> tuple[str, ...]:
        """The tensors that an adapter stores whole."""
        return () if self._adapter is None else tuple(self._adapter.replaced)

    def find(self, name: str) -> TensorInfo | None:
        """A tensor's entry in the table; for the head of a model that ties it, that of its embedding."""
        return self.table.get(self._name(name))

    def read(self, name: str) -> "torch.Tensor":
        """One tensor that `find` finds, on the CPU in its storage dtype; not to be written to.

        It is memory-mapped where no adapter changes it.
        """
        found = self._name(name)
        if found not in self._stored:
            raise InputError(f"{self.source}: the weights lack {name}; {choices(name, self._stored)}.")
        tensor = self._files.read(self._stored[found])
        return tensor if self._adapter is None else self._adapter.adapt(found, tensor, self._files.read)

    def close(self) -> None:
        """Gives back the memory that reading has mapped, as soon as no tensor needs it."""
        self._files.close()

    def _name(self, name: str) -> str:
        if name in self.table or name not in HEAD_NAMES:
            return name
        embeddings = [known for known in self.table if _EMBEDDING.search(known)]
        return embeddings[0] if len(embeddings) == 1 and _ties(self.source.folder) else name

    def _tied(self, head: str) -> tuple[str, str] | None:
        """The head and the embedding that stands for it, of a model that ties them."""
        embedding = self._name(head)
        return (head, embedding) if embedding != head else None

    @property
    def own_head(self) -> str | None:
        """The name of the head, where it is a tensor of its own."""
        return next((name for name in HEAD_NAMES if name in self.table), None)


def _ties(folder: Path) -> bool:
    """Whether a model's head is its embedding: as transformers makes the model, or else as its config says."""
    naming = _naming(folder)
    if naming is not None:
        return any(head in naming.tied for head in HEAD_NAMES)
    return bool(model_config(folder).get("tie_word_embeddings"))


def untied_head(sources: Iterable[Weights]) -> str | None:
    """The name of the head in a merge of sources of which one has a head of its own: then the merge has, too, and in
    sources that tie it the embedding stands for it. None where all of them tie it."""
    return next((source.own_head for source in sources if source.own_head is not None), None)


def _model_table(folder: Path) -> dict[str, TensorInfo]:
    """A model's tensors by the names that transformers would write, whatever the names in its files are."""
    table: dict[str, TensorInfo] = {}
    for file in _weight_files(folder):
        table |= read_header(file)
    table = {name: info for name, info in table.items() if not _BUFFER.search(name)}
    if not (folder / "config.json").exists():
        return table
    naming = _naming(folder)
    if naming is not None:
        read = naming.read_from({name: info.shape for name, info in table.items()})
        table = {name: _cut(table[stored], piece) for name, (stored, piece) in read.items()}
    if any(head in table for head in HEAD_NAMES) and _ties(folder):
        table = {name: info for name, info in table.items() if name not in HEAD_NAMES}
    return table


def _cut(info: TensorInfo, piece: "Piece | None") -> TensorInfo:
    return info if piece is None else replace(info, shape=piece.shape, piece=piece)


def _naming(folder: Path) -> "Naming | None":
    """How transformers calls the tensors of a folder's model; None where it cannot build the model, which is told when
    the model is wanted."""
    from evomerge.merging.naming import naming_in

    try:
        return naming_in(folder)
    except InputError:
        return None


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: not a readable safetensors index ({error}); download it again.") from None
        for name in names:
            if Path(name).name != name or name in ("", ".."):
                raise InputError(f"{index}: shard '{name}' lies outside the model folder; refused.")
            if not (folder / name).exists():
                raise InputError(f"{folder}: shard {name} named by {INDEX} is missing; download it again.")
        return [folder / name for name in names]
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise InputError(
            f"{folder}: weights are pickled ({pickles[0]}), and a pickle can run code when it is opened; "
            "convert them to safetensors (model.save_pretrained) first."
        )
    raise InputError(f"{folder}: holds no {WEIGHTS}; expected a Hugging Face model in safetensors.")


def preflight(base: str, models: Mapping[str, str], same_tensors: bool = True) -> list[str]:
    """Warnings about models whose configs differ from the base's; raises InputError at the first difference that makes
    them unmergeable.

    models: how to call each model in a message, with its reference. same_tensors: whether names and shapes have to be
    the base's too.
    """
    base_source = find_source(base, base)
    base_weights = Weights(base_source)
    sources = {label: Weights(find_source(reference, base)) for label, reference in models.items()}
    head = untied_head([base_weights, *sources.values()])
    base_config, base_table = model_config(base_source.folder), _with_head(base_weights, head)
    _check_floats(base, base_table)
    warnings = []
    for label, weights in sources.items():
        config = model_config(weights.source.folder)
        if config["model_type"] != base_config["model_type"]:
            raise InputError(
                f"{label} is a {config['model_type']} model, but the base ({base}) is a "
                f"{base_config['model_type']} model; only fine-tunes of one base can be merged."
            )
        if same_tensors:
            _check_rows(label, weights, base, base_table)
            _check_tables(label, _with_head(weights, head), base, base_table)
        _check_floats(label, weights.table)
        warnings.append(check_settings(label, config, base, base_config))
    if head is not None and base_weights.own_head is None:
        names = [label for label, weights in sources.items() if weights.own_head is not None]
        warnings.append(
            f"{names[0]} has a head of its own ({head}), which the base ({base}) ties to its embedding: in a merge the "
            "two are tensors of their own."
        )
    return [warning for warning in warnings if warning]


def merged_table(sources: Iterable[ModelSource]) -> dict[str, TensorInfo]:
    """The tensors of a merge: those of the first source, which is the base, and a head where only others have one."""
    weights = [Weights(source) for source in sources]
    return _with_head(weights[0], untied_head(weights))


def _with_head(weights: Weights, head: str | None) -> dict[str, TensorInfo]:
    """A model's table, with its embedding for a head where only others have one of their own."""
    info = weights.find(head) if head is not None else None
    return weights.table | ({head: info} if head is not None and info is not None else {})


def _check_rows(label: str, weights: Weights, base: str, base_table: Mapping[str, TensorInfo]) -> None:
    """Tells an adapter that resized the vocabulary as that."""
    for name in weights.replaced:
        there, here = weights.table[name].shape, base_table[name].shape if name in base_table else ()
        if len(there) == len(here) == 2 and there[0] != here[0] and there[1:] == here[1:]:
            raise InputError(
                f"{label}: the adapter resized the vocabulary: its {name} has {there[0]} rows, but the base ({base}) "
                f"has {here[0]}; resize the base's embeddings alike (resize_token_embeddings), save it and name that, "
                "or train the adapter without new tokens."
            )


def _check_tables(label: str, table: Mapping[str, TensorInfo], base: str, base_table: Mapping[str, TensorInfo]) -> None:
    for tensor, info in base_table.items():
        if tensor not in table:
            raise InputError(
                f"{label} lacks the tensor {tensor} of the base ({base}); only whole fine-tunes can be merged, so save "
                "it with all of its weights."
            )
        if table[tensor].shape != info.shape:
            raise InputError(
                f"{label}: {tensor} has shape {list(table[tensor].shape)}, but the base ({base}) has "
                f"{list(info.shape)}; only models of one shape can be merged."
            )
    extra = sorted(set(table) - set(base_table))
    if extra:
        raise InputError(
            f"{label} has the tensor {extra[0]}, which the base ({base}) lacks; name the base that it was tuned from."
        )


def _check_floats(reference: str, table: Mapping[str, TensorInfo]) -> None:
    for tensor, info in table.items():
        if info.dtype not in FLOATS:
            raise InputError(
                f"{reference}: {tensor} is stored as {info.dtype}; only floating-point weights can be merged "
                f"({', '.join(FLOATS)}), so dequantize the model first."
            )


def load_tensors(source: ModelSource | Path, names: Iterable[str] | None = None) -> "dict[str, torch.Tensor]":
    """The named tensors of a source, or all of them, in their storage dtypes."""
    weights = Weights(source)
    return {name: weights.read(name) for name in (weights.table if names is None else names)}


def identity(source: ModelSource) -> str:
    """16 hexadecimal digits that change when a source's files do: config, sizes, headers, the first and last MiB.

    Reads a few MiB of each file, so that terabytes take no longer than seconds.
    """
    digest = hashlib.sha256()
    files = [source.folder / "config.json", *_weight_files(source.folder)]
    if source.adapter is not None:
        files += [source.adapter / ADAPTER_CONFIG, source.adapter / ADAPTER_WEIGHTS]
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            if file.suffix == ".safetensors":
                digest.update(stream.read(int.from_bytes(stream.read(8), "little")))
            for start in (stream.tell(), max(stream.tell(), size - _SAMPLE)):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:16]
