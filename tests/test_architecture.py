"""Data flows one way, and each heavy dependency lives behind one place."""

import ast
import re
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "evomerge"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
# who may import what is at the edges
OWNERS = {
    "ray": {"workers/ray_pool.py", "runs/cluster.py"},
    "aiohttp": {"reports/serving/web.py"},
    "grpc": {"workers/ray_address.py"},
    "sqlalchemy": {"archive/gradients.py", "archive/storage.py", "archive/trials.py"},
    "lm_eval": {"evaluation/harness.py", "evaluation/loading.py", "evaluation/generation.py"},
    "vllm": {"evaluation/vllm_server.py"},
    "optuna": {
        "archive/archive.py",
        "archive/shared.py",
        "archive/storage.py",
        "archive/trials.py",
        "optimizers/samplers.py",
        "reports/page/importance.py",
    },
    "plotly": {"reports/page/figures.py"},
    "wandb": {"runs/trackers/weights_and_biases.py"},
    "pandas": {"library/candidates.py", "library/runs.py"},
    "IPython": {"library/notebook.py"},
    "jinja2": {"evaluation/loading.py", "reports/page/html.py"},
    "rich": {"reports/terminal.py"},
    "typer": {"cli.py"},
    "cma": {"optimizers/cma_es.py"},
    "cmaes": {"optimizers/cat_cma.py"},
    "moocore": {"optimizers/pareto.py"},
}
# The rooms of the house from the top floor down: a module imports from its own room and from those below it alone.
FLOORS = (
    "library",
    "cli",
    "starting",
    "reports",
    "doctor",
    "diagnosis",
    "runs",
    "export",
    "evidence",
    "search",
    "workers",
    "archive",
    "optimizers",
    "evaluation",
    "conversion",
    "alignment",
    "spaces",
    "merging",
    "devices",
    "events",
    "candidate",
    "recipe",
    "dialect",
    "config",
    "zoo",
    "files",
    "outcomes",
    "layers",
    "versions",
    "seen",
    "randomness",
    "quiet",
    "errors",
)
# what a lower floor must not know either: rooms that work on plain arrays and values
NEVER = {
    "optimizers": {"merging", "evaluation"},
    "evaluation": {"merging", "spaces"},
    "optimizers/pareto.py": {"candidate", "spaces"},
    "export/card.py": {"merging", "evaluation", "workers", "archive"},
    "export/licenses.py": {"merging", "evaluation", "workers", "archive"},
}


@cache
def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(module: str) -> set[str]:
    """The modules of ours that a module imports: of `from package import module`, the module."""
    names = imports(MODULES[module]) & set(MODULES)
    parents = {name.rsplit(".", 1)[0] for name in names}
    packages = {name for name in names & parents if not defines_something(name)}
    return names - packages - {module, "evomerge"}  # which imports nothing before it is asked


def defines_something(package: str) -> bool:
    return any(not isinstance(node, ast.Expr) for node in ast.parse(MODULES[package].read_text()).body)


def room(module: str) -> str:
    return module.split(".")[1]


def files_of(place: str) -> list[Path]:
    """The files of a room, or a module. Fails where there is none, so that a rule cannot outlive what it is about."""
    path = PACKAGE / place
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert files, place
    for file in files:
        assert file.exists(), f"{file} does not exist; a rule is about it"
    return files


def test_every_rule_is_about_what_exists() -> None:
    for place in {*NEVER, *(owner for owners in OWNERS.values() for owner in owners)}:
        assert files_of(place)
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(FLOORS) == rooms - {"__init__", "__main__"}


def test_each_heavy_dependency_has_one_owner() -> None:
    for dependency, owners in OWNERS.items():
        users = {
            str(path.relative_to(PACKAGE))
            for path in MODULES.values()
            if any(name.split(".")[0] == dependency for name in imports(path))
        }
        assert users == owners, dependency


def test_what_another_environment_runs_needs_nothing_of_ours() -> None:
    names = {name.split(".")[0] for name in imports(PACKAGE / "evaluation" / "vllm_server.py")}
    assert names <= {*sys.stdlib_module_names, "torch", "vllm"}


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.count(".")))
def test_a_module_imports_from_its_own_floor_and_those_below(module: str) -> None:
    if module == "evomerge.__main__":
        return
    floor = FLOORS.index(room(module))
    for name in own_imports(module):
        assert room(name) in FLOORS[floor:], f"{module} imports {name}, which lies above it"


def test_rooms_that_work_on_plain_values_know_nothing_else() -> None:
    for place, forbidden in NEVER.items():
        for path in files_of(place):
            for name in imports(path):
                if name.startswith("evomerge."):
                    assert room(name) not in forbidden, f"{path} imports {name}"


def test_no_imports_go_in_a_circle() -> None:
    """Those inside functions count too: they hide a circle, they do not undo it."""
    try:
        list(TopologicalSorter({module: own_imports(module) for module in MODULES}).static_order())
    except CycleError as circle:
        pytest.fail(" imports ".join(reversed(circle.args[1])))


def test_what_only_some_devices_have_is_asked_for_in_one_file() -> None:
    kinds = re.compile(r"\btorch\.(cuda|mps|xpu|accelerator|get_device_module)\b|\.pin_memory\(|pin_memory=|\.cuda\(")
    users = {str(path.relative_to(PACKAGE)) for path in MODULES.values() if kinds.search(path.read_text())}
    assert users == {"devices.py"}


def test_nothing_opens_pickles_or_runs_remote_code() -> None:
    for path in MODULES.values():
        text = path.read_text()
        assert not {"pickle", "torch.load"} & imports(path), path
        assert "torch.load(" not in text, path
        assert "trust_remote_code=True" not in text, path
