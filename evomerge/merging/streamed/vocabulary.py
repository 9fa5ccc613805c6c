"""Vocabulary: the output's tokenizer, and every model's embeddings in its order before they are merged.

The rules are those of mergekit 0.1.5. A model that lacks a token gets an embedding for it:

- of the only model that has the token, or
- of the base, if it has the token, or
- the average over the models that have it, or
- zeros, if no model has it.

A recipe's `tokenizer.tokens` may name another source. Rows beyond the tokens are padding: the average of all tokens.
"""

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evomerge.errors import InputError, choices
from evomerge.merging.sources.tokenizers import read_tokenizer
from evomerge.merging.streamed.chat_templates import CHAT_TEMPLATES
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
    """

    tokenizer: Any
    size: int
    rows: Mapping[str, torch.Tensor]
    own: Mapping[str, Mapping[str, int]]
    settings: Mapping[int, TokenSettings]

    def aligned(self, tensors: Mapping[str, torch.Tensor], base: str | None) -> dict[str, torch.Tensor]:
        """The embeddings of the models that are merged, each with one row per row of the output's embeddings.

        tensors: the embeddings by model, float32, with one row per token of the model.
        base: the model whose embeddings are preferred where others lack a token, if it is among `tensors`.
        Raises InputError where a token's source is not among them.
        """
        device = next(iter(tensors.values())).device
        rows = {model: self.rows[model].to(device) for model in tensors}
        has = torch.stack([rows[model] >= 0 for model in tensors])
        forced = torch.zeros(has.shape[1], dtype=torch.bool, device=device)
        forced[[token for token, settings in self.settings.items() if settings.force]] = True
        instead = self._defaults(tensors, rows, has, forced, base)
        return {model: self._rows(tensors[model], rows[model], instead, forced) for model in tensors}

    def _rows(
        self, tensor: torch.Tensor, rows: torch.Tensor, instead: torch.Tensor, forced: torch.Tensor
    ) -> torch.Tensor:
        kept = (rows >= 0) & ~forced
        aligned = tensor.new_empty((self.size, *tensor.shape[1:]))
        tokens = aligned[: len(rows)]
        tokens[kept] = tensor[rows[kept]]
        tokens[~kept] = instead[~kept]
        aligned[len(rows) :] = tokens.mean(dim=0)
        return aligned

    def _defaults(
        self,
        tensors: Mapping[str, torch.Tensor],
        rows: Mapping[str, torch.Tensor],
        has: torch.Tensor,
        forced: torch.Tensor,
        base: str | None,
    ) -> torch.Tensor:
        """The embedding of each token for models that lack the token."""
        some = next(iter(tensors.values()))
        owners = has.sum(dim=0)
        defaults = some.new_zeros((has.shape[1], *some.shape[1:]))
        wanted = (owners < len(tensors)) | forced
        for model, tensor in tensors.items():
            mine = wanted & (rows[model] >= 0)
            defaults[mine] += tensor[rows[model][mine]]
        defaults /= owners.clamp(min=1).reshape(-1, *[1] * (some.dim() - 1))
        if base is not None and base in tensors:
            mine = wanted & (rows[base] >= 0)
            defaults[mine] = tensors[base][rows[base][mine]]
        for token, settings in self.settings.items():
            if wanted[token] and settings.source is not None:
                defaults[token] = self._configured(tensors, token, settings)
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
        nowhere = torch.stack(list(self.rows.values())).amax(dim=0) < 0
        return [
            str(self.tokenizer.convert_ids_to_tokens(token))
            for token in nowhere.nonzero().flatten().tolist()
            if token not in self.settings or self.settings[token].source is None
        ]


def build_vocabulary(
    recipe: Recipe, settings: TokenizerSettings, folders: Mapping[str, Path], sizes: Mapping[str, int]
) -> Vocabulary:
    """The vocabulary of a merge's output.

    recipe: the recipe. The first model that it names counts as `base`; it is the base where there is one.
    settings: how the recipe builds the tokenizer.
    folders: the models' folders, by reference.
    sizes: how many rows each model's embeddings have, by reference.
    Raises InputError where a tokenizer cannot be read, or a source of a token does not exist.
    """
    tokenizers = {reference: read_tokenizer(folders[reference]) for reference in recipe.references}
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
    )
    for token, wanted in built.settings.items():
        if isinstance(wanted.source, str | ModelToken):
            built.source(token, wanted)
    return built


def _output(
    source: str,
    folders: Mapping[str, Path],
    tokenizers: Mapping[str, Any],
    own: Mapping[str, Mapping[str, int]],
) -> Any:
    from evomerge.merging.sources.references import locate

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
    return read_tokenizer(folders[source] if source in folders else locate(source))


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


def chat_template(recipe: Recipe, folders: Mapping[str, Path], where: str) -> str | None:
    """The Jinja text that a recipe's `chat_template` stands for; None for `auto` where no model has a template.

    `auto` is the template that most models have. A name is that of a model, or of a format (chat_templates.py).

    recipe: the recipe.
    folders: the models' folders, by reference.
    where: what the recipe is called, which opens an error's message.
    Raises InputError for any other name, and for a model without a template.
    """
    wanted = recipe.chat_template or ""
    if wanted == "auto":
        templates = [text for text in map(_template, folders.values()) if text]
        return Counter(templates).most_common(1)[0][0] if templates else None
    if wanted in folders:
        text = _template(folders[wanted])
        if text is None:
            raise InputError(f"{where}: chat_template: {wanted} has no chat template; name another model, or use auto.")
        return text
    if "{" in wanted:
        return wanted
    if wanted in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[wanted]
    options = choices(wanted, ["auto", *CHAT_TEMPLATES])
    raise InputError(
        f"{where}: chat_template is '{wanted}', no known format; {options}, or write a model of the recipe, or the "
        "template itself (Jinja)."
    )


def _template(folder: Path) -> str | None:
    template = read_tokenizer(folder).chat_template
    template = template.get("default") if isinstance(template, dict) else template
    return template.strip() if template else None
