"""Searches whose candidates are scored in 8 bits: unlike scores are never compared, and what was scored ships."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from evomerge.archive.archive import Archive
from evomerge.config import files
from evomerge.events import unheard
from evomerge.export import choice
from evomerge.search import preparation
from evomerge.search.best import FINALISTS, finalists
from evomerge.search.loop import Search
from evomerge.search.results import Results
from evomerge.workers import memory
from tests import commands
from tests.fakes import FakePool, Killed
from tests.searches import tiny_search

GAP = 0.3  # by which quantized scores of the pretended workers are too high


@pytest.fixture
def prepared(search_file):
    optimizer = {"evaluations": 15, "population": 5, "lag": 0}
    path = search_file(
        optimizer=optimizer, evaluation={"quantize": "int8"}, controls={"random_search": True}, subsets=False
    )
    return preparation.prepare(files.load(path))


class TwoScores(FakePool):
    """Pretended workers whose quantized scores are higher, and rank candidates otherwise in their last digits."""

    def wait(self):
        job, evaluation = super().wait()
        assert evaluation.scores is not None
        gap = GAP + 0.02 * np.sin(7 * job.candidate.index) if job.quantized else 0.0
        evaluation.scores.update({name: score + gap for name, score in evaluation.scores.items()})
        return job, evaluation


def quality(candidate):
    genome = np.array(candidate.genome if candidate.genome is not None else [0.0])
    return tuple(float(0.5 * np.exp(-((genome - goal) ** 2).mean())) for goal in (0.8, 0.3))


def run(prepared, directory: Path, **pool) -> Results:
    directory.mkdir(exist_ok=True)
    archive = Archive(directory, prepared.config, prepared.space.genes)
    fake = TwoScores([metric.name for metric in prepared.config.measured], quality, **pool)
    Search(prepared.config, prepared.space, archive, fake, unheard).run()
    return Results(archive, prepared.config)


def test_the_search_goes_by_quantized_scores_and_only_finalists_get_others(prepared, tmp_path):
    archive = run(prepared, tmp_path / "run").archive
    screened, whole = archive.records("quantized"), archive.records("search")
    assert len(screened) == 4 + 15 + 15
    assert {record.evaluation.quantize for record in screened} == {"int8"}
    assert {record.evaluation.quantize for study in ("search", "heldout") for record in archive.records(study)} == {
        None
    }
    assert 4 + 2 * FINALISTS <= len(whole) < len(screened)
    families = [record.candidate.id.split("-")[0] for record in whole]
    assert families.count("random") == FINALISTS  # as many chances as the search's own


def test_the_winner_is_the_best_by_unquantized_scores_alone(prepared, tmp_path):
    results = run(prepared, tmp_path / "run")
    records = [record for record in results.archive.records("search") if record.candidate.kind == "search"]
    best = max(records, key=lambda record: np.mean(list(record.evaluation.scores.values())))
    assert results.study == "search"
    assert results.best() == best
    assert all(record.evaluation.quantize is None for record in [*results.front(), *results.records()])
    assert {candidate.id for candidate in results.reported()} <= {record.candidate.id for record in results.records()}


def test_rows_say_which_scores_are_quantized_and_keep_both_of_finalists(prepared, tmp_path):
    results = run(prepared, tmp_path / "run")
    rows = commands.candidates(results.archive, results.config)
    for row in rows:
        before = results.archive.find(row["id"], "quantized").evaluation.scores
        if row["quantize"] is None:
            assert row["quantized"] == before != row["scores"]
        else:
            assert (row["scores"], row["quantized"]) == (before, None)
            assert row["heldout_missing"] == "scored with quantized weights only, and not among the finalists"
    assert {row["quantize"] for row in rows} == {None, "int8"}
    assert {row["quantize"] for row in commands.front(results.archive, results.config)} == {None}


@pytest.mark.parametrize("after", [3, 20, 36, 50])
def test_a_killed_search_goes_on_to_the_same_archive(prepared, tmp_path, after):
    expected = run(prepared, tmp_path / "whole")
    with pytest.raises(Killed):
        run(prepared, tmp_path / "killed", dies_after=after)
    cut = Results(Archive(tmp_path / "killed", prepared.config, prepared.space.genes), prepared.config)
    alike = {record.evaluation.quantize for record in [*cut.records(), *cut.front()]}
    assert len(alike) == 1
    resumed = run(prepared, tmp_path / "killed")
    assert commands.candidates(resumed.archive, resumed.config) == commands.candidates(
        expected.archive, expected.config
    )
    assert commands.front(resumed.archive, resumed.config) == commands.front(expected.archive, expected.config)


def test_a_candidate_that_was_only_screened_is_exported_with_a_warning(prepared, tmp_path):
    results = run(prepared, tmp_path / "run")
    chosen = {candidate.id for candidate in results.finalists()}
    tried = [record.candidate for record in results.archive.tried() if record.candidate.kind == "search"]
    name = next(candidate.id for candidate in tried if candidate.id not in chosen)
    record = choice.choose(results, name, [])
    assert record.evaluation.quantize == "int8"
    assert "was scored with quantized weights (int8)" in choice.warnings(record, results)[0]
    assert not any("int8" in sentence for sentence in choice.warnings(results.best(), results))


def test_finalists_are_distinct_by_their_weights(prepared, tmp_path):
    results = run(prepared, tmp_path / "run")
    records = results.archive.records("quantized")
    twice = [*records, *(record for record in records if record.candidate.kind == "search")]
    assert finalists(twice, results.criteria("quantized")) == results.finalists()


def test_what_was_scored_in_8_bits_ships_with_its_fingerprint(tiny_models, tmp_path):
    search = tmp_path / "search.yaml"
    document = tiny_search(tiny_models) | {"evaluation": {"quantize": "int8", "device": "cpu"}}
    search.write_text(yaml.safe_dump(document))
    commands.evomerge("run", search, "--output", tmp_path / "run")
    rows = commands.content(tmp_path / "run")[0]
    best = yaml.safe_load((tmp_path / "run" / "best.yaml").read_text())["evomerge"]
    row = next(row for row in rows if row["id"] == best["candidate"])
    assert row["fingerprint"] == best["fingerprint"]
    assert "quantized" not in best
    assert row["quantized"] is not None
    printed = commands.evomerge("merge", tmp_path / "run" / "best.yaml", tmp_path / "out")
    assert best["fingerprint"] in printed
    commands.evomerge("run", search, "--output", tmp_path / "again")
    assert commands.content(tmp_path / "again") == commands.content(tmp_path / "run")


def test_gradients_refuse_quantized_candidates(search_file, refuses):
    given = {"evaluation": {"quantize": "int8"}}
    asked = search_file(optimizer={"name": "learned", "evaluations": 60}, **given)
    refuses("check", asked, says=("optimizer asks for learned, but evaluation.quantize is int8",))


def test_auto_leaves_gradients_out_where_candidates_are_quantized_and_says_so(search_file):
    optimizer = {"name": "auto", "evaluations": 200}
    with_gradients = preparation.prepare(files.load(search_file(optimizer=optimizer)))
    without = preparation.prepare(files.load(search_file(optimizer=optimizer, evaluation={"quantize": "int8"})))
    assert with_gradients.config.optimizer.follows_gradients
    assert not without.config.optimizer.follows_gradients
    assert any("evaluation.quantize is int8" in warning for warning in without.warnings)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"space": {"kind": "data_flow"}}, "space.kind is data_flow"),
        ({"optimizer": {"evaluations": 20, "stop_after": 5}, "items": {"search": 8, "selection": 8}}, "stop_after"),
    ],
)
def test_what_cannot_be_quantized_is_refused_with_its_reason(changes, reason, search_file, refuses):
    path = search_file(evaluation={"quantize": "int8"}, **changes)
    refuses("check", path, says=("evaluation.quantize is int8, but", reason))


def test_a_search_that_quantizes_nothing_has_the_digest_that_it_had_before(search_file):
    config = files.load(search_file())
    said = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"quantize": "int8"})})
    assert memory.unquantized(said).digest() == config.digest() != said.digest()
