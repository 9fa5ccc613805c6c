"""Checkpoint: a merge written as a plain Hugging Face folder, whole or not at all.

The folder is written under a temporary name beside its place, read back, compared with the expected fingerprint, and
only then renamed.
"""

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from evomerge.errors import InputError, WorkFailed
from evomerge.merging.materialize import fingerprint, load_model
from evomerge.merging.sources import named_weights

COPIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja", "*.model")


def check_writable(out: Path) -> None:
    """Raises InputError where a new folder `out` cannot be made."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not empty; choose a new folder or remove this one.")
    parent = next(path for path in out.absolute().parents if path.exists())
    if not parent.is_dir():
        raise InputError(f"{out}: {parent} is a file; choose a path inside a folder.")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(f"{out}: cannot write there ({error.strerror}); choose a writable folder.") from None


def write_checkpoint(
    model: Any, tokenizer_folder: Path, out: Path, expected: str, extra: Iterable[tuple[str, str]]
) -> None:
    """Writes `model` with the tokenizer of `tokenizer_folder` and extra text files (name, content) to `out`.

    Raises WorkFailed where the weights read back do not have the expected fingerprint; nothing is left then.
    """
    check_writable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        model.save_pretrained(staging, safe_serialization=True)
        for pattern in COPIED:
            for file in tokenizer_folder.glob(pattern):
                shutil.copyfile(file, staging / file.name)
        for name, content in extra:
            (staging / name).write_text(content, encoding="utf-8")
        _verify(staging, next(model.parameters()).dtype, expected)
        for file in staging.iterdir():
            file.chmod(0o644)  # safetensors writes 0600
        staging.chmod(0o755)
        if out.exists():
            out.rmdir()
        staging.rename(out)
    except (OSError, SafetensorError) as error:
        raise WorkFailed(
            f"{out}: the checkpoint could not be written ({error}); free some space and try again."
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _verify(folder: Path, dtype: torch.dtype, expected: str) -> None:
    found = fingerprint(named_weights(load_model(folder, dtype)))
    if found != expected:
        raise WorkFailed(f"{folder}: the written weights have fingerprint {found}, expected {expected}; not kept.")
