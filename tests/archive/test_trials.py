"""What is written straight into Optuna's tables is what Optuna itself writes and reads."""

from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from evomerge.archive.trials import Trials

KINDS = {
    "weight": FloatDistribution(-1.0, 2.0),
    "depth": IntDistribution(0, 9),
    "method": CategoricalDistribution(("ties", "dare_ties", "linear")),
}


def finished_trials() -> list[FrozenTrial]:
    full = {"params": {"weight": 1 / 3, "depth": 7, "method": "dare_ties"}, "distributions": KINDS}
    part = {"params": {"weight": -1.0}, "distributions": {"weight": KINDS["weight"]}}
    attributes = {"id": "g0000-00", "recipe": {"models": [{"weight": 0.1, "name": "größer"}]}, "arrival": [0, 1]}
    return [
        create_trial(state=TrialState.COMPLETE, values=[0.1, float("-inf")], user_attrs=attributes, **full),
        create_trial(state=TrialState.COMPLETE, values=[float("inf"), 1e-300], **part),
        create_trial(state=TrialState.FAIL, user_attrs={"error": "out of memory"}, **full),
        create_trial(state=TrialState.COMPLETE, values=[1, 0]),
    ]


def check_rows_and_trials(url: str) -> None:
    """Writes the same trials into two studies, through Optuna and through ours, and compares rows and trials."""
    storage = optuna.storages.RDBStorage(url)
    studies = {
        name: optuna.create_study(storage=storage, study_name=name, directions=["maximize", "minimize"])
        for name in ("ours", "optuna")
    }
    for trial in finished_trials():  # taking turns: numbers count within a study
        studies["optuna"].add_trial(trial)
        Trials(storage.engine).add("ours", trial)
    assert rows(storage.engine, "ours") == rows(storage.engine, "optuna")
    assert len(rows(storage.engine, "ours")["trial_params"]) == 7
    ours, theirs = (optuna.load_study(study_name=name, storage=storage).trials for name in studies)
    for mine, other in zip(ours, theirs, strict=True):
        other._trial_id = mine._trial_id
        assert mine == other
    storage.engine.dispose()


def rows(engine: sqlalchemy.Engine, study: str) -> dict[str, list[Any]]:
    """All that a study's trials have in each table, by the number of the trial, without the tables' own keys."""
    metadata = sqlalchemy.MetaData()
    metadata.reflect(engine)
    trials, studies = metadata.tables["trials"], metadata.tables["studies"]
    found = {}
    with engine.connect() as connection:
        for name, table in metadata.tables.items():
            if "trial_id" not in table.c:
                continue
            joined = trials.join(studies, studies.c.study_id == trials.c.study_id)
            joined = joined if table is trials else joined.join(table, table.c.trial_id == trials.c.trial_id)
            own = [
                column for column in table.c if not column.primary_key and column.name not in ("trial_id", "study_id")
            ]
            query = sqlalchemy.select(trials.c.number, *own).select_from(joined).where(studies.c.study_name == study)
            found[name] = sorted((tuple(row) for row in connection.execute(query)), key=str)
    return found


def test_rows_and_trials_are_those_that_optuna_would_have_written(tmp_path: Path) -> None:
    check_rows_and_trials(f"sqlite:///{tmp_path / 'archive.db'}")
