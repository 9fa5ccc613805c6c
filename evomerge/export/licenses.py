"""The licenses of models, read from their cards, and the license that a merge of them must carry.

A merge is derived from all of its parents, so the terms of all of them hold at once. Its card carries the most
restrictive license, and the user is warned where that does not say everything. This is bookkeeping, not legal advice.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

OTHER = "other"

# The kinds of licenses, from the least restrictive to the most: what the kind asks, and the hub's ids of its licenses.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "asks nothing": ("anyone may do anything", ("cc0-1.0", "unlicense", "wtfpl", "pddl")),
    "asks for its notice": (
        "anyone may do anything as long as the notice is kept",
        ("mit", "isc", "bsd", "bsd-2-clause", "bsd-3-clause", "apache-2.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0"),
    ),
    "forbids some uses": (
        "a list of forbidden uses has to be handed on",
        ("openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m", "bigcode-openrail-m"),
    ),
    "has terms of its own": (
        "its owner's terms on use, size of business and naming have to be handed on",
        ("gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "deepfloyd-if-license"),
    ),
    "asks for the same license": (
        "what is made of it may only be shared under the same license, without further terms",
        ("lgpl-3.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "gpl-2.0", "gpl-3.0", "agpl-3.0"),
    ),
    "forbids commerce": (
        "it may not be used commercially",
        ("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
    ),
    "forbids derivatives": (
        "what is made of it, as a merge is, may not be shared at all",
        ("cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"),
    ),
}
_KIND = {identifier: kind for kind, (_, identifiers) in KINDS.items() for identifier in identifiers}
_RANK = {identifier: rank for rank, identifier in enumerate(_KIND)}
_COMPATIBLE = ("asks nothing", "asks for its notice")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the licenses of a merge's parents mean for the merge.

    license: the hub's id for the merge's card.
    warnings: what the user must look at.
    """

    license: str
    warnings: tuple[str, ...]


def stated_license(folders: Iterable[Path]) -> str | None:
    """The license that a model's README.md states in its front matter; None where a folder's card states none.

    folders: the model's, and its adapter's where there is one; of several licenses, the most restrictive counts.
    """
    statements = [_front_matter(folder / "README.md").get("license") for folder in folders]
    stated = [
        str(name).lower()
        for item in statements
        for name in (item if isinstance(item, list) and item else [item])
        if name
    ]
    if len(stated) < len(statements):
        return None
    return max(stated, key=lambda identifier: _RANK.get(identifier, len(_RANK)), default=None)


def _front_matter(card: Path) -> Mapping[str, object]:
    """The YAML between the dashes at the top of a card; empty where it cannot be read."""
    try:
        before, separator, rest = card.read_text(encoding="utf-8").partition("---\n")
        front, end, _ = rest.partition("\n---")
        content = yaml.safe_load(front) if separator and end and not before.strip() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def combined(licenses: Mapping[str, str | None]) -> Verdict:
    """The most restrictive of the parents' licenses, with warnings; `other` where a license is not in `KINDS`.

    licenses: the hub's id of each parent's license, by the parent's name; None where its card states none.
    """
    warnings = [
        f"the license of {model} is unknown "
        f"({f'its card says {stated}' if stated else 'its card states none'}); look it up before you share the merge."
        for model, stated in licenses.items()
        if stated not in _KIND
    ]
    recognized = {model: stated for model, stated in licenses.items() if stated in _KIND and stated is not None}
    terms = {stated: model for model, stated in recognized.items() if _KIND[stated] not in _COMPATIBLE}
    if len(terms) > 1:
        listed = ", ".join(f"{stated} ({model}: {KINDS[_KIND[stated]][0]})" for stated, model in terms.items())
        warnings.append(f"the licenses of the models may contradict each other, since all hold at once: {listed}.")
    for model, stated in recognized.items():
        if _KIND[stated] == "forbids derivatives":
            warnings.append(f"the license of {model}, {stated}, forbids to share what is made of it, as a merge is.")
    if len(recognized) < len(licenses) or not recognized:
        return Verdict(OTHER, tuple(warnings))
    return Verdict(max(recognized.values(), key=_RANK.__getitem__), tuple(warnings))
