"""From a model reference to folders: `zoo:NAME`, a folder, a Hugging Face id, with `@REVISION` and `+ADAPTER`."""

from dataclasses import dataclass
from pathlib import Path

from evomerge import zoo
from evomerge.errors import InputError
from evomerge.merging.sources.adapters import CONFIG as ADAPTER_CONFIG
from evomerge.merging.sources.adapters import is_adapter

HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model's files are.

    folder: the model's folder.
    adapter: the folder of an adapter that is merged into the model on reading; None where there is none.
    """

    folder: Path
    adapter: Path | None = None

    def __str__(self) -> str:
        return str(self.folder) if self.adapter is None else f"{self.folder}+{self.adapter}"


def find_source(reference: str, base: str) -> ModelSource:
    """The source of a model reference.

    reference: of a model, of a model with an adapter, or of an adapter.
    base: the reference of the model that an adapter named by itself changes.
    Raises InputError where there is no such model.
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
    """The model and the adapter of a reference `MODEL+ADAPTER`; None for an adapter where it names none.

    A folder that has a plus in its name is one model. Raises InputError for more than one plus, or an empty name.
    """
    if "+" not in reference or Path(reference).expanduser().is_dir():
        return reference, None
    model, _, adapter = reference.partition("+")
    if not model or not adapter or "+" in adapter:
        raise InputError(f"{reference}: expected MODEL+ADAPTER, one of each.")
    return model, adapter


def pinned(reference: str, source: ModelSource) -> str:
    """The reference, with the commits that its Hugging Face ids stand for now in place of their revisions.

    reference: of a model.
    source: where it was found.
    """
    model, adapter = split_adapter(reference)
    if adapter is not None and source.adapter is not None:
        return f"{_pin(model, source.folder)}+{_pin(adapter, source.adapter)}"
    return _pin(reference, source.adapter or source.folder)


def _pin(reference: str, folder: Path) -> str:
    downloaded = folder.parent.name == "snapshots" and not Path(reference).expanduser().exists()
    return f"{reference.partition('@')[0]}@{folder.name}" if downloaded else reference


def _adapter_folder(reference: str) -> Path:
    folder = locate(reference)
    if not (folder / ADAPTER_CONFIG).exists():
        raise InputError(
            f"{reference}: {ADAPTER_CONFIG} is missing; only a LoRA as PEFT saves it can follow a plus sign."
        )
    return folder


def locate(reference: str) -> Path:
    """The folder of a model or an adapter, downloaded if necessary. Raises InputError where there is none."""
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
