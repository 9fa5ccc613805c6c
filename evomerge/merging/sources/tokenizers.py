"""The tokenizer of a model folder, without code from it."""

from typing import Any

from evomerge.errors import InputError, first_line
from evomerge.merging.sources.references import find_source
from evomerge.quiet import quiet


def read_tokenizer(key: str, reference: str, base: str) -> Any:
    """A model's tokenizer. Raises InputError, opened by `key`, where there is none."""
    folder = find_source(reference, base).folder
    try:
        with quiet():
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizer files are parsed by several libraries, each with its own exceptions
        reason = first_line(error).rstrip(".: ")
        raise InputError(
            f"{key}: {folder}: its tokenizer cannot be loaded ({reason}); check config.json and the tokenizer's files."
        ) from None
