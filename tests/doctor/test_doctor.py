"""The doctor: all is well on a healthy machine, and every broken thing shows in a line of its own and in the status."""

import json

import pytest
import yaml

from evomerge.candidate import failure
from evomerge.doctor import Finding, Patient, cluster, examination, merges, searches, speeds
from evomerge.merging.resident.models import ResidentModels
from evomerge.search.preparation import prepare_file
from evomerge.versions import versions
from evomerge.workers.worker import Worker
from evomerge.zoo.small import write_search
from tests.commands import evomerge
from tests.searches import tiny_search


@pytest.fixture(scope="module")
def patient(tiny_models, tmp_path_factory) -> Patient:
    search = tmp_path_factory.mktemp("doctor") / "search.yaml"
    search.write_text(yaml.safe_dump(tiny_search(tiny_models) | {"evaluation": {"device": "cpu"}}))
    return Patient(search, (), prepare_file(search))


def test_a_healthy_machine_passes_with_one_document_of_json(tmp_path, monkeypatch):
    monkeypatch.setattr(speeds, "_COPIED", 1 << 24)
    monkeypatch.setattr(speeds, "_MOST_OVER_FLOOR", 1e6)  # other work slows down one measurement and not the other
    search = write_search(tmp_path / "small")
    told = json.loads(evomerge("doctor", search, "--set", "evaluation.device=cpu", "--json"))
    assert told["healthy"] is True
    assert {finding["check"] for finding in told["findings"]} >= {
        "memory",
        "copies",
        "fingerprints",
        "scores",
        "search",
    }
    assert all(finding["good"] and finding["expected"] and finding["found"] for finding in told["findings"])


def test_every_way_of_making_a_merge_has_the_same_fingerprints(patient):
    found = list(merges.fingerprints(patient))
    assert len(found) >= 3
    assert len({finding.found for finding in found}) == 1
    assert all(finding.good for finding in found)


def test_a_way_that_makes_other_weights_shows_and_fails(patient, monkeypatch):
    materialize = ResidentModels.materialize

    def broken(self, recipe, quantized=False):
        fingerprint = materialize(self, recipe, quantized)
        return fingerprint[::-1] if quantized else fingerprint

    monkeypatch.setattr(ResidentModels, "materialize", broken)
    off = [finding for finding in merges.fingerprints(patient) if not finding.good]
    assert [finding.where for finding in off] == ["cpu, before it is quantized"]
    monkeypatch.setattr(examination, "CHECKS", (merges.fingerprints,))
    told = json.loads(evomerge("doctor", patient.search, "--json", status=1))
    assert told["healthy"] is False
    assert [finding["good"] for finding in told["findings"]].count(False) == 1
    assert "OFF" in evomerge("doctor", patient.search, status=1)


def test_scores_that_differ_between_two_workers_are_off(patient, monkeypatch):
    assert all(finding.good for finding in searches.scores(patient))
    evaluate, scored = Worker.evaluate, []

    def broken(self, *given):
        evaluation = evaluate(self, *given)
        scored.append(evaluation)
        evaluation.scores.update({name: score + len(scored) for name, score in evaluation.scores.items()})
        return evaluation

    monkeypatch.setattr(Worker, "evaluate", broken)
    assert [finding.good for finding in searches.scores(patient)] == [False]


def test_a_search_whose_candidates_fail_is_off_and_says_why(patient, monkeypatch):
    evaluate = Worker.evaluate

    def broken(self, recipe, *given):
        return failure("out of memory") if len(recipe.models or ()) > 1 else evaluate(self, recipe, *given)

    monkeypatch.setattr(Worker, "evaluate", broken)
    (found,) = searches.smoke(patient)
    assert not found.good
    assert "out of memory" in found.found


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(patient, monkeypatch):
    def breaks(_):
        raise RuntimeError("CUDA error: an illegal memory access")
        yield

    def fine(_):
        yield Finding("fine", "here", "this", "this", True)

    monkeypatch.setattr(examination, "CHECKS", (breaks, fine))
    found = list(examination.examine(patient.search))
    assert [finding.good for finding in found] == [False, True]
    assert "illegal memory access" in found[0].found


def test_a_node_with_another_version_is_off_and_the_version_is_named(patient, monkeypatch):
    nodes = {"one": versions(), "two": versions() | {"torch": "1.0"}, "three": "no module named evomerge"}
    monkeypatch.setattr(cluster, "versions_by_node", lambda address: nodes)
    asked = Patient(patient.search, (), patient.prepared, "127.0.0.1:6379")
    found = {finding.where: finding for finding in cluster.nodes(asked)}
    assert [finding.good for finding in found.values()] == [True, False, False]
    assert found["two"].found == "torch 1.0"
    assert "no module named evomerge" in found["three"].found
    assert list(cluster.nodes(patient)) == []


def test_memory_above_the_plan_is_off(patient, monkeypatch):
    assert all(finding.good for finding in searches.memory(patient))
    peaks = iter([0, 1 << 42])
    monkeypatch.setattr(searches, "_peak", lambda device, anew=False: next(peaks))
    assert [finding.good for finding in searches.memory(patient)] == [True, False]


def test_a_slow_device_is_off(patient, monkeypatch):
    monkeypatch.setattr(speeds, "_COPIED", 1 << 20)
    monkeypatch.setattr(speeds, "_merge", lambda device: 3600.0)
    found = list(speeds.speeds(patient))
    assert [finding.good for finding in found] == [True, False]


def test_a_mistake_in_the_search_file_is_bad_input(tmp_path, refuses):
    (tmp_path / "search.yaml").write_text("base: zoo:base\n")
    refuses("doctor", tmp_path / "search.yaml", says=("models",))
