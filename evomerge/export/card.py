"""The card of a merged checkpoint: README.md with the front matter that the Hugging Face hub reads."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from evomerge.export.licenses import Verdict
from evomerge.recipe import Recipe


def model_card(recipe: Recipe, fingerprint: str, verdict: Verdict) -> str:
    """The text of a merge's README.md: parents, license, scores, and the recipe that makes the weights again.

    recipe: the merge's, with the scores and aliases of its search.
    fingerprint: the weights'.
    verdict: the merge's license and the warnings about it.
    """
    aliases = recipe.evomerge.aliases
    parents = [aliases.get(reference, reference) for reference in recipe.references]
    front: dict[str, Any] = {
        "base_model": parents,
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": verdict.license,
        "tags": ["merge", "mergekit", "evomerge"],
    }
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(), "---", "# Merged model", ""]
    lines += [f"Merged by evomerge with `{recipe.merge_method}` from:", "", *(f"- `{name}`" for name in parents), ""]
    lines += [f"Fingerprint of the weights: `{fingerprint}`", ""]
    lines += _license_lines(verdict.warnings)
    for title, scores in (("Search items", recipe.evomerge.scores), ("Held-out items", recipe.evomerge.heldout)):
        lines += _score_lines(title, scores)
    if recipe.evomerge.verdicts:
        lines += [
            "## Beside its parents and controls",
            "",
            *(f"- {verdict}" for verdict in recipe.evomerge.verdicts),
            "",
        ]
    return "\n".join([*lines, "## Recipe", "", "```yaml", recipe.to_yaml().strip(), "```", ""])


def _license_lines(warnings: Sequence[str]) -> list[str]:
    if not warnings:
        return []
    return ["## License", "", *(f"- {warning[0].upper()}{warning[1:]}" for warning in warnings), ""]


def _score_lines(title: str, scores: Mapping[str, float | None] | None) -> list[str]:
    if not scores:
        return []
    rows = [f"| {name} | {value:.4f} |" for name, value in scores.items() if value is not None]
    return [f"## {title}", "", "| objective | score |", "|---|---|", *rows, ""]
