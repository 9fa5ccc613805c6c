"""Trials: finished evaluations written into the tables of Optuna's storage, where its studies and dashboards find them.

Optuna's own `add_trial` is made for trials that grow: it asks the database two questions for each parameter and one for
each attribute, which takes a driver more time than all else that it does. A trial that comes finished is five inserts.
Optuna refuses to open tables of another schema than that of its version.
"""

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sqlalchemy

_TABLES = ("studies", "trials", "trial_params", "trial_values", "trial_user_attributes")


class Trials:
    """The tables of one storage."""

    def __init__(self, engine: "sqlalchemy.Engine") -> None:
        import sqlalchemy

        metadata = sqlalchemy.MetaData()
        metadata.reflect(engine, only=_TABLES)
        self._engine, self._tables = engine, metadata.tables
        self._distributions: dict[Any, str] = {}

    def add(self, study: str, trial: Any) -> None:
        """Writes a finished trial in one transaction.

        study: the name of the study.
        trial: Optuna's FrozenTrial.
        """
        import sqlalchemy

        studies, trials = self._tables["studies"], self._tables["trials"]
        with self._engine.begin() as connection:
            named = sqlalchemy.select(studies.c.study_id).where(studies.c.study_name == study)
            study_id = connection.execute(named.with_for_update()).scalar_one()
            earlier = sqlalchemy.select(sqlalchemy.func.count()).where(trials.c.study_id == study_id)
            row = {
                "study_id": study_id,
                "number": connection.scalar(earlier),
                "state": trial.state.name,
                "datetime_start": _utc(trial.datetime_start),
                "datetime_complete": _utc(trial.datetime_complete),
            }
            key = connection.execute(trials.insert(), row).inserted_primary_key
            assert key is not None  # one row was inserted
            for table, rows in self._parts(trial).items():
                if rows:
                    connection.execute(self._tables[table].insert(), [{"trial_id": key[0], **each} for each in rows])

    def _parts(self, trial: Any) -> Mapping[str, list[dict[str, Any]]]:
        """The rows of a trial by table."""
        params = [
            {
                "param_name": name,
                "param_value": trial.distributions[name].to_internal_repr(value),
                "distribution_json": self._distribution(trial.distributions[name]),
            }
            for name, value in trial.params.items()
        ]
        values = [
            {
                "objective": objective,
                "value": value if math.isfinite(value) else None,
                "value_type": "FINITE" if math.isfinite(value) else "INF_POS" if value > 0 else "INF_NEG",
            }
            for objective, value in enumerate(trial.values or ())
        ]
        attributes = [{"key": key, "value_json": json.dumps(value)} for key, value in trial.user_attrs.items()]
        return {"trial_params": params, "trial_values": values, "trial_user_attributes": attributes}

    def _distribution(self, distribution: Any) -> str:
        from optuna.distributions import distribution_to_json

        if distribution not in self._distributions:
            self._distributions[distribution] = distribution_to_json(distribution)
        return self._distributions[distribution]


def _utc(moment: datetime | None) -> datetime | None:
    """As Optuna stores it: without a time zone."""
    return moment.astimezone(UTC).replace(tzinfo=None) if moment is not None else None
