"""Text from outside, made safe for the labels of figures.

Plotly renders some tags of HTML in labels, and it decodes entities there. So what must stay text is written as
entities. Pages themselves are escaped by their template.
"""

import unicodedata

_LONGEST = 60


def label(text: object, longest: int = _LONGEST) -> str:
    """A text for a label of a figure: in one line, not too long, and nothing in it is a tag.

    text: anything; what it is as text counts.
    longest: how many characters are kept at most; the middle of a longer text is left out.
    """
    return entities(shortened(text, longest))


def shortened(text: object, longest: int = _LONGEST) -> str:
    """A text in one line without control characters, whose middle is left out where it is too long."""
    line = " ".join("".join(character if _visible(character) else " " for character in str(text)).split())
    if len(line) <= longest:
        return line
    kept = (longest - 1) // 2
    return f"{line[: longest - 1 - kept]}…{line[-kept:]}"


def _visible(character: str) -> bool:
    return unicodedata.category(character)[0] != "C"


def entities(text: str) -> str:
    """A text with entities for all characters with which a tag or an entity begins or ends."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
