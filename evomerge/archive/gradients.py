"""Gradients: what workers said to each step of a learned stage, in a table beside Optuna's.

A gradient is stored rounded to float32, and the search learns from it as it is stored. So a replay learns the same.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import sqlalchemy

TABLE = "evomerge_gradients"


@dataclass(frozen=True, slots=True)
class GradientRecord:
    """What is kept of one shard of one step.

    step: the number of the step; below 0 for losses that are asked for before the first.
    shard: the number of the shard.
    genome: the digest of the genome (`digest_of`).
    losses: the shard's share of the mean loss of each metric, by name; empty where the candidate failed.
    slopes: the derivative of the weighted sum of losses by each gene, as float32 holds it, shape (genes,).
    fingerprint: that of the merged weights; None where there was no merge.
    error: why the candidate failed; None where it did not.
    seconds: how long it took.
    """

    step: int
    shard: int
    genome: str
    losses: Mapping[str, float]
    slopes: NDArray[np.float64]
    fingerprint: str | None = None
    error: str | None = None
    seconds: float = 0.0


def digest_of(genome: Sequence[float]) -> str:
    """A digest of a genome's bits, 16 hexadecimal digits."""
    return hashlib.sha256(np.asarray(genome, dtype="<f8").tobytes()).hexdigest()[:16]


def rounded(slopes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Derivatives as they are stored."""
    return slopes.astype("<f4").astype(np.float64)


class KeptGradients:
    """The gradients of one run, in memory."""

    def __init__(self, records: Iterable[GradientRecord]) -> None:
        self._records = {(record.step, record.shard): record for record in records}

    def find(self, step: int, shard: int) -> GradientRecord | None:
        """The record of a shard of a step; None where there is none."""
        return self._records.get((step, shard))

    def all(self) -> list[GradientRecord]:
        """Every record, by step and shard."""
        return [self._records[key] for key in sorted(self._records)]


class Gradients(KeptGradients):
    """The gradients of one run, in memory and in its storage."""

    def __init__(self, engine: "sqlalchemy.Engine", study: str, writing: bool) -> None:
        """engine: the storage's.
        study: what the names of the run's studies begin with.
        writing: whether the table is made where it is missing.
        """
        import sqlalchemy

        self._engine, self._study = engine, study
        self._table = sqlalchemy.Table(
            TABLE,
            sqlalchemy.MetaData(),
            sqlalchemy.Column("study", sqlalchemy.String(512), primary_key=True),
            sqlalchemy.Column("step", sqlalchemy.Integer, primary_key=True, autoincrement=False),
            sqlalchemy.Column("shard", sqlalchemy.Integer, primary_key=True, autoincrement=False),
            sqlalchemy.Column("genome", sqlalchemy.String(16), nullable=False),
            sqlalchemy.Column("losses", sqlalchemy.Text, nullable=False),
            sqlalchemy.Column("slopes", sqlalchemy.LargeBinary, nullable=False),
            sqlalchemy.Column("fingerprint", sqlalchemy.String(16)),
            sqlalchemy.Column("error", sqlalchemy.Text),
            sqlalchemy.Column("seconds", sqlalchemy.Float, nullable=False),
        )
        there = sqlalchemy.inspect(engine).has_table(TABLE)
        if writing and not there:
            self._make(engine)
        super().__init__(self._load() if there else ())

    def _make(self, engine: "sqlalchemy.Engine") -> None:
        """Makes the table, unless another run makes it in the same storage at this moment."""
        import sqlalchemy

        try:
            self._table.create(engine, checkfirst=True)
        except sqlalchemy.exc.SQLAlchemyError:
            if not sqlalchemy.inspect(engine).has_table(TABLE):
                raise

    def _load(self) -> list[GradientRecord]:
        import sqlalchemy

        with self._engine.connect() as connection:
            rows = connection.execute(sqlalchemy.select(self._table).where(self._table.c.study == self._study))
            return [of_row(dict(row)) for row in rows.mappings()]

    def add(self, record: GradientRecord) -> None:
        """Writes a record in one transaction."""
        row = {
            "study": self._study,
            "step": record.step,
            "shard": record.shard,
            "genome": record.genome,
            "losses": json.dumps(dict(record.losses)),
            "slopes": record.slopes.astype("<f4").tobytes(),
            "fingerprint": record.fingerprint,
            "error": record.error,
            "seconds": round(record.seconds, 4),
        }
        with self._engine.begin() as connection:
            connection.execute(self._table.insert(), row)
        self._records[record.step, record.shard] = record

    def holds(self, record: GradientRecord) -> bool:
        """Whether the storage holds a record of the same shard of the same step."""
        there = any((other.step, other.shard) == (record.step, record.shard) for other in self._load())
        if there:
            self._records[record.step, record.shard] = record
        return there


def of_row(row: Mapping[str, Any]) -> GradientRecord:
    """The record in a row of the table, given by column."""
    return GradientRecord(
        step=row["step"],
        shard=row["shard"],
        genome=row["genome"],
        losses=json.loads(row["losses"]),
        slopes=np.frombuffer(row["slopes"], dtype="<f4").astype(np.float64),
        fingerprint=row["fingerprint"],
        error=row["error"],
        seconds=row["seconds"],
    )
