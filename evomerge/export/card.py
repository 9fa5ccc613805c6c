"""The card of a merged checkpoint: README.md with the front matter that the Hugging Face hub reads."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from evomerge.export.licenses import Verdict
from evomerge.export.names import public_names, public_recipe
from evomerge.recipe import HeldoutRow, HeldoutTable, Recipe


def model_card(recipe: Recipe, fingerprint: str, verdict: Verdict) -> str:
    """The text of a merge's README.md: parents, license, scores, and the recipe that makes the weights again. It names
    no path of this machine.

    recipe: the merge's, with the scores and aliases of its search.
    fingerprint: the weights'.
    verdict: the merge's license and the warnings about it.
    """
    return _card(recipe, fingerprint, verdict, {}, [])


def _card(recipe: Recipe, fingerprint: str, verdict: Verdict, changes: Mapping[str, Any], more: Sequence[str]) -> str:
    """The text of a card, with changed front matter and more lines below the parents."""
    names = public_names(recipe)
    public = public_recipe(recipe)
    parents = [names[reference] for reference in recipe.references]
    aligned = public.evomerge.aligned
    front: dict[str, Any] = {
        "base_model": [aligned[name].model if name in aligned else name for name in parents],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": verdict.license,
        "tags": ["merge", "mergekit", "evomerge"],
        **changes,
    }
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(), "---", "# Merged model", ""]
    told = [f"- `{name}`" + (f", which is {aligned[name].sentence}" if name in aligned else "") for name in parents]
    lines += [f"Merged by evomerge with `{recipe.merge_method}` from:", "", *told, ""]
    lines += [f"Fingerprint of the weights: `{fingerprint}`", "", *more]
    lines += _license_lines(verdict.warnings)
    lines += _score_lines("Search items", recipe.evomerge.scores)
    table = recipe.evomerge.table
    lines += _score_lines("Held-out items", recipe.evomerge.heldout) if table is None else _table_lines(table)
    if recipe.evomerge.verdicts:
        lines += [
            "## Beside its parents and controls",
            "",
            *(f"- {verdict}" for verdict in recipe.evomerge.verdicts),
            "",
        ]
    written = public.to_yaml().strip()
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", written))])
    return "\n".join([*lines, "## Recipe", "", f"{fence}yaml", written, fence, ""])


def adapter_card(
    recipe: Recipe, base: str, fingerprint: str, kept: Sequence[tuple[str, int, int, float]], verdict: Verdict
) -> str:
    """The text of the README.md of a merge that is written as an adapter: as `model_card`, with what the adapter keeps.

    recipe: the merge's, with its own fingerprint.
    base: the name of the model that the adapter changes.
    fingerprint: that of the base with the adapter merged into it.
    kept: for the matrices of each name: the name, their number, the largest rank, and the least share of the squared
        change that the adapter keeps.
    verdict: the merge's license and the warnings about it.
    """
    front = {"library_name": "peft", "base_model": base, "base_model_relation": "adapter"}
    lines = [
        "## The adapter",
        "",
        f"This is a LoRA on `{base}`. With it merged in, the weights have the fingerprint `{fingerprint}`. The scores "
        "below are those of the whole merge. The table says what the LoRA keeps of it.",
        "",
        "| matrices | number | largest rank | kept of the change, at least |",
        "|---|---|---|---|",
        *(f"| {_cell(kind)} | {number} | {rank} | {percent(share)} |" for kind, number, rank, share in kept),
        "",
    ]
    return _card(recipe, str(recipe.evomerge.fingerprint), verdict, front, lines)


def percent(share: float) -> str:
    """A share as a percentage that is never rounded up."""
    return f"{math.floor(share * 10000) / 100:.2f} %"


def _license_lines(warnings: Sequence[str]) -> list[str]:
    if not warnings:
        return []
    return ["## License", "", *(f"- {warning[0].upper()}{warning[1:]}" for warning in warnings), ""]


def _score_lines(title: str, scores: Mapping[str, float | None] | None) -> list[str]:
    if not scores:
        return []
    rows = [f"| {_cell(name)} | {value:.4f} |" for name, value in scores.items() if value is not None]
    return [f"## {title}", "", "| objective | score |", "|---|---|", *rows, ""]


def _table_lines(table: HeldoutTable) -> list[str]:
    """The scores of the merge beside those of the controls, with intervals."""
    names = list(dict.fromkeys(name for row in table.rows for name in row.scores))
    titles = ["model", *names, table.mean_name]
    counts = ["items", *(str(table.items.get(name, "")) for name in names), ""]
    rows = [titles, ["---"] * len(titles), counts, *(_cells(row, names) for row in table.rows)]
    note = "In parentheses: the 95 % interval of the score over items. The search saw none of these items."
    return ["## Held-out items", "", *("| " + " | ".join(map(_cell, row)) + " |" for row in rows), "", note, ""]


def _cells(row: HeldoutRow, names: Sequence[str]) -> list[str]:
    """A row of the table, in which a score that is missing is a dash."""
    cells = [row.title]
    for name in names:
        value, between = row.scores.get(name), row.intervals.get(name)
        score = "-" if value is None else f"{value:.3f}"
        cells.append(score if value is None or between is None else f"{score} ({between[0]:.3f} to {between[1]:.3f})")
    return [*cells, "-" if row.mean is None else f"{row.mean:.3f}"]


def _cell(text: str) -> str:
    """A text that ends no cell of a table."""
    return " ".join(text.replace("|", "\\|").split())
