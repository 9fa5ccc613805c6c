"""Which items a search saw, as digests of their content: what a recipe carries, so that no report shows them as held
out.

An item has two digests, one of its document and one of what a model is shown of it. Two items are the same where they
share a digest: one document under two templates, or one text under two document numbers. A digest has six bytes, so
that ten thousand items on each side meet by chance once in three million times.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable
from typing import Any

Digests = frozenset[bytes]
SIZE = 6  # bytes


def digest_of(*parts: Any) -> bytes:
    """The digest of values, which are written as JSON, or as Python shows them where JSON cannot write them."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=repr)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=SIZE).digest()


def encoded(digests: Iterable[bytes]) -> str:
    """Digests as one line of text, sorted; eight characters each."""
    return base64.b64encode(b"".join(sorted(set(digests)))).decode()


def decoded(text: str) -> Digests:
    """The digests in a line of text. Raises ValueError for text that `encoded` did not write."""
    try:
        content = base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError("it is no base64") from None
    if len(content) % SIZE:
        raise ValueError(f"it has {len(content)} bytes, expected a multiple of {SIZE}")
    return frozenset(content[start : start + SIZE] for start in range(0, len(content), SIZE))
