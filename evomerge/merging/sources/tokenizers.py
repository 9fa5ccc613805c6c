"""The tokenizer of a model folder, without code from it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import InputError, first_line
from evomerge.quiet import quiet

if TYPE_CHECKING:
    import torch

_MOST_TOKENS = 1024


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model folder. Raises InputError where there is none that transformers reads."""
    try:
        with quiet():
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizer files are parsed by several libraries, each with its own exceptions
        reason = first_line(error).rstrip(".: ")
        raise InputError(
            f"{folder}: its tokenizer cannot be loaded ({reason}); check config.json and the tokenizer's files."
        ) from None


def token_ids(tokenizer: Any, text: str) -> "torch.Tensor":
    """The tokens of a text, its first 1024 at most; shape (1, tokens).

    tokenizer: as `read_tokenizer` gives it.
    text: one text.
    """
    ids: torch.Tensor = tokenizer(text, return_tensors="pt", truncation=True, max_length=_MOST_TOKENS).input_ids
    return ids
