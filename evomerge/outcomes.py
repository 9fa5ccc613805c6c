"""Outcomes: what became of every item of a task, small enough to be kept for every evaluation.

Right or wrong takes a bit, any other value four bytes, a margin two. Nothing is unpacked until somebody asks.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True)
class Outcomes:
    """One value per item, in the order of the split's items, and for some metrics a margin.

    A margin is positive where the item was right, negative where it was wrong, and near zero where a small change would
    have changed the outcome. It is in nats, or in nats per character or byte for metrics that divide log-likelihoods by
    lengths.

    count: how many items there are.
    bits: the values, a bit each, where all are 0 or 1; otherwise None.
    floats: the values as float32 where some are not; otherwise None.
    packed_margins: the margins as float16; None for a metric that has none.
    packed_places: for a subset, a bit per item of the split that says whether the subset has it; otherwise None.
    """

    count: int
    bits: bytes | None
    floats: bytes | None
    packed_margins: bytes | None
    packed_places: bytes | None = None

    @classmethod
    def of(
        cls, values: Sequence[float], margins: Sequence[float] | None = None, chosen: Sequence[bool] | None = None
    ) -> Self:
        """The outcomes of items.

        values: one per item; rounded to float32 unless all are 0 or 1.
        margins: one per item, rounded to float16; None for a metric that has none.
        chosen: for each item of the split, whether it is one of the items; by default all are.
        """
        array = np.asarray(values, dtype=np.float64)
        binary = bool(np.isin(array, (0.0, 1.0)).all())
        return cls(
            count=len(array),
            bits=np.packbits(array.astype(bool)).tobytes() if binary else None,
            floats=None if binary else array.astype("<f4").tobytes(),
            packed_margins=None
            if margins is None
            else np.clip(np.asarray(margins, dtype=np.float64), -_LARGEST, _LARGEST).astype("<f2").tobytes(),
            packed_places=None if chosen is None else np.packbits(np.asarray(chosen, dtype=bool)).tobytes(),
        )

    @property
    def values(self) -> NDArray[np.float64]:
        """The values, shape (items,)."""
        if self.bits is not None:
            return np.unpackbits(np.frombuffer(self.bits, dtype=np.uint8), count=self.count).astype(np.float64)
        return np.frombuffer(self.floats or b"", dtype="<f4").astype(np.float64)

    @property
    def places(self) -> NDArray[np.int64]:
        """The items' positions in the split, ascending, shape (items,)."""
        if self.packed_places is None:
            return np.arange(self.count)
        return np.flatnonzero(np.unpackbits(np.frombuffer(self.packed_places, dtype=np.uint8)))

    @property
    def margins(self) -> NDArray[np.float64] | None:
        """The margins, shape (items,); None for a metric that has none."""
        if self.packed_margins is None:
            return None
        return np.frombuffer(self.packed_margins, dtype="<f2").astype(np.float64)

    def to_json(self) -> dict[str, Any]:
        """The outcomes as the archive keeps them: packed bytes in base64."""
        fields = {
            "bits": self.bits,
            "floats": self.floats,
            "margins": self.packed_margins,
            "places": self.packed_places,
        }
        packed = {key: base64.b64encode(content).decode() for key, content in fields.items() if content is not None}
        return {"count": self.count, **packed}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The outcomes that `to_json` wrote."""

        def unpacked(key: str) -> bytes | None:
            return base64.b64decode(content[key]) if key in content else None

        return cls(content["count"], unpacked("bits"), unpacked("floats"), unpacked("margins"), unpacked("places"))
