"""Vocabulary: the output's tokenizer, and every model's embeddings in its order before they are merged.

The rules are those of mergekit 0.1.5. A model that lacks a token gets an embedding for it:

- of the only model that has the token, or
- of the base, if it has the token, or
- the average over the models that have it, or
- zeros, if no model has it.

A recipe's `tokenizer.tokens` may name another source. Rows beyond the tokens are padding: the average of all tokens.

In a search, all merges have the base's tokens, and as many rows as the base.
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evomerge.config.search import SearchConfig
from evomerge.errors import InputError, choices
from evomerge.merging.building import load_config
from evomerge.merging.naming import naming_in
from evomerge.merging.sources.models import Model, Models
from evomerge.merging.sources.tokenizers import read_tokenizer
from evomerge.quiet import quiet
from evomerge.recipe import ModelToken, Recipe, TokenizerSettings, TokenSettings, ZeroToken


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The output's tokenizer, and where its tokens are in each model.

    tokenizer: the transformers tokenizer of the output.
    size: how many rows the output's embeddings have.
    rows: each model's row of every token, int64, shape (tokens,); -1 where the model lacks the token.
    own: each model's rows by the text of the token.
    settings: what the recipe says about single tokens, by id.
    wanted: the recipe's settings.
    """

    tokenizer: Any
    size: int
    rows: Mapping[str, torch.Tensor]
    own: Mapping[str, Mapping[str, int]]
    settings: Mapping[int, TokenSettings]
    wanted: TokenizerSettings

    def complete(self, model: str) -> bool:
        """Whether a model has every token that any model has, and no token is taken from elsewhere."""
        return not self.settings and bool(((self.rows[model] >= 0) | self._nowhere).all())

    def aligned(
        self, tensors: Mapping[str, torch.Tensor], base: str | None, wanted: Iterable[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """The embeddings of the models that are merged, each with one row per row of the output's embeddings, float32.

        tensors: the embeddings by model, with one row per token of the model.
        base: the model whose embeddings are preferred where others lack a token, if it is among `tensors`.
        wanted: the models whose embeddings are made; by default all of them.
        Raises InputError where a token's source is not among them.
        """
        device = next(iter(tensors.values())).device
        rows = {model: self.rows[model].to(device) for model in tensors}
        owners = torch.stack([rows[model] >= 0 for model in tensors]).sum(dim=0)
        forced = torch.zeros(owners.shape, dtype=torch.bool, device=device)
        forced[[token for token, settings in self.settings.items() if settings.force]] = True
        lacked = ((owners < len(tensors)) | forced).nonzero().flatten()
        instead = self._defaults(tensors, {model: own[lacked] for model, own in rows.items()}, lacked.tolist(), base)
        made = {}
        for model in tensors if wanted is None else wanted:
            kept = (rows[model] >= 0) & ~forced
            made[model] = self._rows(tensors[model], rows[model], kept, lacked, instead)
        return made

    def _rows(
        self,
        tensor: torch.Tensor,
        rows: torch.Tensor,
        kept: torch.Tensor,
        lacked: torch.Tensor,
        instead: torch.Tensor,
    ) -> torch.Tensor:
        """One model's embeddings: its own for the tokens that are `kept`, and `instead` for those of the `lacked` that
        are not."""
        aligned = tensor.new_empty((self.size, *tensor.shape[1:]), dtype=torch.float32)
        tokens, missing = aligned[: len(rows)], ~kept[lacked]
        tokens[kept] = tensor[rows[kept]].to(torch.float32)
        tokens[lacked[missing]] = instead[missing]
        if self.size > len(rows):
            aligned[len(rows) :] = _mean(tokens)
        return aligned

    def _defaults(
        self,
        tensors: Mapping[str, torch.Tensor],
        rows: Mapping[str, torch.Tensor],
        tokens: Sequence[int],
        base: str | None,
    ) -> torch.Tensor:
        """The embedding of each of some tokens for models that lack it, float32.

        rows: each model's row of each token; -1 where it lacks the token.
        """
        some = next(iter(tensors.values()))
        defaults = some.new_zeros((len(tokens), *some.shape[1:]), dtype=torch.float32)
        owners = torch.zeros(len(tokens), device=some.device)
        for model, tensor in tensors.items():
            mine = rows[model] >= 0
            owners += mine
            defaults[mine] += tensor[rows[model][mine]].to(torch.float32)
        defaults /= owners.clamp(min=1).reshape(-1, *[1] * (some.dim() - 1))
        if base is not None and base in tensors:
            mine = rows[base] >= 0
            defaults[mine] = tensors[base][rows[base][mine]].to(torch.float32)
        for place, token in enumerate(tokens):
            settings = self.settings.get(token)
            if settings is not None and settings.source is not None:
                defaults[place] = self._configured(tensors, token, settings)
        return defaults

    def _configured(self, tensors: Mapping[str, torch.Tensor], token: int, settings: TokenSettings) -> torch.Tensor:
        source, some = settings.source, next(iter(tensors.values()))
        if isinstance(source, ZeroToken):
            return some.new_zeros(some.shape[1:])
        model, row = self.source(token, settings)
        text = self.tokenizer.convert_ids_to_tokens(token)
        if model not in tensors:
            raise InputError(
                f"tokenizer.tokens['{text}'].source names {model}, which is not merged here; {choices(model, tensors)}."
            )
        if not 0 <= row < len(tensors[model]):
            raise InputError(
                f"tokenizer.tokens['{text}'].source names row {row} of {model}, which has {len(tensors[model])}."
            )
        return tensors[model][row]

    def source(self, token: int, settings: TokenSettings) -> tuple[str, int]:
        """The model, and its row, that a token's embedding is taken from.

        token: the token's id in the output.
        settings: what the recipe says about it; its source is a model or a token of a model.
        Raises InputError for an unknown model, and for a token that the model lacks.
        """
        text, source = self.tokenizer.convert_ids_to_tokens(token), settings.source
        if isinstance(source, ModelToken):
            model, wanted = source.model, source.token
        else:
            model, wanted = str(source), text
        if model not in self.own:
            raise InputError(
                f"tokenizer.tokens['{text}'].source names {model}, no model of the recipe; {choices(model, self.own)}."
            )
        if isinstance(source, ModelToken) and source.token_id is not None:
            return model, source.token_id
        if wanted not in self.own[model]:
            raise InputError(
                f"tokenizer.tokens['{text}'].source: {model} has no token '{wanted}'; name another source."
            )
        return model, self.own[model][str(wanted)]

    def moved(self, reference: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """The `bos_token_id` and similar keys of a model's config, with ids of this vocabulary. A token that it lacks
        is None, or is left out of a list.

        reference: the model.
        content: its config, or its generation config.
        """
        new = {old: token for token, old in enumerate(self.rows[reference].tolist()) if old >= 0}
        moved: dict[str, Any] = {}
        for key, value in content.items():
            if key.endswith("_token_id") and isinstance(value, list):
                moved[key] = [new[old] for old in value if old in new]
            elif key.endswith("_token_id") and value is not None:
                moved[key] = new.get(value)
        return moved

    @property
    def unknown(self) -> list[str]:
        """The tokens that no model has and that the recipe names no source for."""
        return [
            str(self.tokenizer.convert_ids_to_tokens(token))
            for token in self._nowhere.nonzero().flatten().tolist()
            if token not in self.settings or self.settings[token].source is None
        ]

    @property
    def _nowhere(self) -> torch.Tensor:
        """Which tokens no model has."""
        return torch.stack(list(self.rows.values())).amax(dim=0) < 0


def _mean(rows: torch.Tensor) -> torch.Tensor:
    """The mean of rows, added in float64 one after the other, so that its bits depend on no device and no threads."""
    total = np.add.reduce(rows.cpu().numpy(), axis=0, dtype=np.float64)
    return torch.from_numpy(np.asarray(total / len(rows), dtype=np.float32)).to(rows.device)


def build_vocabulary(settings: TokenizerSettings, folders: Mapping[str, Path], sizes: Mapping[str, int]) -> Vocabulary:
    """The vocabulary of a merge's output.

    settings: how the tokenizer is built.
    folders: the models' folders, by reference. The first one counts as `base`.
    sizes: how many rows each model's embeddings have, by reference.
    Raises InputError where a tokenizer cannot be read, or a source of a token does not exist.
    """
    tokenizers = {reference: read_tokenizer(folder) for reference, folder in folders.items()}
    own = {
        reference: {text: row for text, row in tokenizer.get_vocab().items() if row < sizes[reference]}
        for reference, tokenizer in tokenizers.items()
    }
    tokenizer = _output(settings.source, folders, tokenizers, own)
    present = tokenizer.get_vocab()
    for text in settings.tokens or {}:
        if text not in present:
            tokenizer.add_tokens(text)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    count = max(vocabulary.values()) + 1
    rows = {reference: torch.full((count,), -1, dtype=torch.int64) for reference in tokenizers}
    for reference, table in own.items():
        shared = [(token, table[text]) for text, token in vocabulary.items() if text in table]
        new, old = torch.tensor(shared, dtype=torch.int64).reshape(-1, 2).T
        rows[reference][new] = old
    multiple = settings.pad_to_multiple_of or 1
    built = Vocabulary(
        tokenizer=tokenizer,
        size=-(-count // multiple) * multiple,
        rows=rows,
        own=own,
        settings={vocabulary[text]: token for text, token in (settings.tokens or {}).items()},
        wanted=settings,
    )
    for token, wanted in built.settings.items():
        if isinstance(wanted.source, str | ModelToken):
            built.source(token, wanted)
    return built


def of_search(config: SearchConfig, models: Models) -> Vocabulary | None:
    """The vocabulary of a search's merges; None where its models have one vocabulary.

    config: the search's, resolved.
    models: the models of the search.
    Raises InputError where a tokenizer cannot be read.
    """
    if config.space.tokenizer_source is None:
        return None
    every = {models.base.reference: models.base, **models}
    return _of_base(tuple((reference, model.folder) for reference, model in every.items()))


def with_tokens(recipe: Recipe, config: SearchConfig, models: Models) -> Recipe:
    """A recipe of a search that says itself which tokens its merge has.

    recipe: the recipe.
    config: the search's, resolved.
    models: the models of the search.
    Raises InputError where the base's tokenizer cannot be read.
    """
    if config.space.tokenizer_source is None:
        return recipe
    return recipe.model_copy(update={"tokenizer": tokens_of(models.base.folder, config.base)})


@lru_cache(maxsize=1)
def _of_base(folders: tuple[tuple[str, Path], ...]) -> Vocabulary:
    reference, folder = folders[0]
    return build_vocabulary(
        tokens_of(folder, reference), dict(folders), {model: _size(folder) for model, folder in folders}
    )


def tokens_of(folder: Path, reference: str) -> TokenizerSettings:
    """The settings of a recipe whose output has the tokens of a model, and as many rows.

    folder: the model's.
    reference: the model's.
    Raises InputError where the model has tokens without a row.
    """
    tokens, rows = read_tokenizer(folder).get_vocab(), _size(folder)
    count = max(tokens.values()) + 1
    if count > rows:
        extra = max(tokens, key=lambda text: tokens[text])
        raise InputError(
            f"{folder}: its tokenizer has the token '{extra}', for which its embeddings have no row; resize them "
            "(resize_token_embeddings), or take another base."
        )
    return TokenizerSettings(source=reference, pad_to_multiple_of=None if count == rows else rows)


def other_size(model: Model, base: Model) -> bool:
    """Whether a model has another number of rows than the base. Raises InputError where it then has no tokenizer."""
    tables = [(base.weights.find(name), model.weights.find(name)) for name in naming_in(base.folder).vocabulary]
    if model.folder == base.folder or all(
        here is None or there is None or here.shape[:1] == there.shape[:1] for here, there in tables
    ):
        return False
    read_tokenizer(model.folder)
    return True


def other_rows(model: Model, base: Model) -> bool:
    """Whether a model lacks a token of the base, or has it in another row. A model without a tokenizer does not."""
    if model.folder == base.folder:
        return False
    try:
        own = read_tokenizer(model.folder).get_vocab()
    except InputError:
        return False
    return any(own.get(text) != row for text, row in read_tokenizer(base.folder).get_vocab().items())


def _size(folder: Path) -> int:
    """How many rows the embeddings of the model in a folder have."""
    return int(load_config(folder).get_text_config().vocab_size)


def _output(
    source: str,
    folders: Mapping[str, Path],
    tokenizers: Mapping[str, Any],
    own: Mapping[str, Mapping[str, int]],
) -> Any:
    from evomerge.merging.sources.references import locate, split_adapter

    base = next(iter(tokenizers))
    if source in ("base", "union"):
        extra = sorted(set(tokenizers[base].get_vocab()) - set(own[base]))
        if extra:
            raise InputError(
                f"{base}: its tokenizer has the token '{extra[0]}', for which its embeddings have no row; "
                "take another tokenizer (tokenizer_source)."
            )
    if source == "base":
        return tokenizers[base]
    if source == "union":
        return _union(tokenizers, own)
    return read_tokenizer(folders[source] if source in folders else locate(split_adapter(source)[0]))


def _union(tokenizers: Mapping[str, Any], own: Mapping[str, Mapping[str, int]]) -> Any:
    """The first tokenizer, with the tokens of the others added, model by model, in the order of their rows."""
    base = next(iter(tokenizers))
    with tempfile.TemporaryDirectory() as folder, quiet():
        tokenizers[base].save_pretrained(folder)
        union = read_tokenizer(Path(folder))
    plain: dict[str, None] = {}
    added: dict[str, Any] = {}
    for model, tokenizer in tokenizers.items():
        marked = {info.content: info for _, info in sorted(tokenizer.added_tokens_decoder.items())}
        plain |= {text: None for text, _ in sorted(own[model].items(), key=lambda item: item[1]) if text not in marked}
        added = {text: info for text, info in marked.items() if text in own[model]} | added
    first = own[base]
    union.add_tokens([text for text in plain if text not in first and text not in added])
    union.add_tokens(list(added.values()))
    return union
