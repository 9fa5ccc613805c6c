"""What a page is made of: sections of blocks, which are figures and tables with sentences above them. All plain values,
so that tests can look at them without a browser."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Figure = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Select:
    """A drop-down above a figure.

    label: what is chosen.
    options: the choices as text.
    axis: the axis for which each option names a list of values, in `meta` of every trace; empty where the option is a
        part of the name of a variant.
    start: the index of the first choice.
    """

    label: str
    options: tuple[str, ...]
    axis: Literal["", "x", "y"] = ""
    start: int = 0


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure, with what drop-downs make of it.

    figure: plotly's data and layout.
    selects: the drop-downs.
    variants: data and changes of the layout by the indices of the chosen options, as in `2|0`.
    """

    figure: Figure
    selects: tuple[Select, ...] = ()
    variants: Mapping[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Table:
    """A table.

    head: the titles of its columns.
    rows: its cells as text.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Text:
    """A long text that can be folded away, such as a file.

    title: what it is.
    content: the text.
    copied: whether it has a button that copies it.
    opened: whether it is unfolded at first.
    """

    title: str
    content: str
    copied: bool = False
    opened: bool = False


@dataclass(frozen=True, slots=True)
class Block:
    """A figure, a table or a list of sentences.

    id: unique on the page; its anchor.
    title: what it is called.
    says: what it shows, or why it cannot be shown.
    drawing: the figure.
    tables: the tables.
    notes: further sentences.
    texts: what is folded away.
    folded: tables that are folded away, by their titles.
    """

    id: str
    title: str
    says: str
    drawing: Drawing | None = None
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    texts: tuple[Text, ...] = ()
    folded: Mapping[str, Table] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the page.

    id: its anchor.
    title: its heading.
    blocks: what it holds.
    """

    id: str
    title: str
    blocks: tuple[Block, ...]
