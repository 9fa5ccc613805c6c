"""Renders a task's documents: question, options and answer of every item, as the model will see them.

Each split of a task is rendered once, without few-shot examples, and kept as long as lm-eval's task object lives.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evomerge.seen import Digests, digest_of

Side = Literal["validation", "selection", "test", "fewshot"]
_KEPT: "weakref.WeakKeyDictionary[Any, dict[Side, list[Item]]]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Item:
    """One document of a task, rendered.

    text: the question; where the options are questions and the answer is shared, the number of the right option.
    choices: the options; None where the task has none.
    target: the answer: a text, the number of an option, or a list of texts or numbers.
    error: why the task's templates cannot render the document; None where they can.
    document: the digest of the document.
    digests: items are the same where they share one of these; the document's is among them (`evomerge.seen`).
    """

    text: Any
    choices: Any
    target: Any
    error: Exception | None
    document: bytes
    digests: Digests

    @property
    def question(self) -> str:
        """The question as people read it."""
        return str(self.text)


def items_of(task: Any, side: Side) -> list[Item]:
    """The items of a task, in the order of its documents; empty where the task has no documents on that side.

    task: lm-eval's.
    side: whether its validation documents, the documents that its file keeps for selection, its test documents or its
        few-shot examples are meant.
    """
    kept = _KEPT.setdefault(task, {})
    if side not in kept:
        kept[side] = [_item(task, document) for document in documents_of(task, side)]
    return kept[side]


def documents_of(task: Any, side: Side) -> Sequence[Any]:
    """The documents of a task, in their order; it takes the same parameters as `items_of`."""
    if side == "fewshot":
        return list(getattr(getattr(task, "sampler", None), "df", None) or [])
    if side == "selection":
        return list(selection_documents(task)) if selection_split(task) is not None else []
    if not (task.has_test_docs() if side == "test" else task.has_validation_docs()):
        return []
    return list(task.test_docs() if side == "test" else task.validation_docs())


def selection_split(task: Any) -> str | None:
    """The split that a task's file keeps for selection items (`metadata: {selection_split: NAME}`); None where it keeps
    none.

    task: lm-eval's, which carries the metadata of its file along without a look at it.
    """
    metadata = getattr(task.config, "metadata", None)
    name = metadata.get("selection_split") if isinstance(metadata, Mapping) else None
    return None if name is None else str(name)


def selection_documents(task: Any) -> Sequence[Any]:
    """The documents of a task's selection split, processed as lm-eval processes those of other splits."""
    documents: Sequence[Any] = task.dataset[selection_split(task)]
    process = task.config.process_docs
    return documents if process is None else process(documents)


def _item(task: Any, document: Any) -> Item:
    text = choices = target = error = None
    try:
        text = task.doc_to_text(document)
        asked = getattr(task.config, "doc_to_choice", None) is not None
        choices = task.doc_to_choice(document) if asked else None
        target = task.doc_to_target(document)
    except Exception as failure:  # templates and functions of tasks may raise anything
        error = failure
    own = document_digest(document)
    shown = digest_of("shown", _plain(text), _plain(choices), _plain(target))
    return Item(text, choices, target, error, own, frozenset({own} if error else {own, shown}))


def document_digest(document: Any) -> bytes:
    """The digest of a document as it is, however a task renders it."""
    return digest_of("document", document)


def _plain(value: Any) -> Any:
    """A value with each run of white space made one blank, since items do not differ by white space alone."""
    if isinstance(value, str):
        return " ".join(value.split())
    return [_plain(element) for element in value] if isinstance(value, list | tuple) else value
