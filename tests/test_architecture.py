"""Data flows one way, and each heavy dependency lives behind one module."""

import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "evomerge"

# who may import what is at the edges
OWNERS = {
    "ray": {"workers/ray_pool.py", "cluster.py"},
    "grpc": {"workers/ray_address.py"},
    "sqlalchemy": {"archive.py", "trials.py"},
    "lm_eval": {"evaluation/harness.py", "evaluation/loading.py", "evaluation/generation.py"},
    "vllm": {"evaluation/vllm_server.py"},
    "optuna": {"archive.py", "trials.py"},
    "rich": {"terminal.py"},
    "typer": {"cli.py"},
    "cma": {"optimizers/cma_es.py"},
    "cmaes": {"optimizers/cat_cma.py"},
    "moocore": {"pareto.py"},
}
# config → space → optimizer → recipe → merge plan → worker → evaluation → archive → export
NEVER = {
    "evomerge/merging": {"spaces", "optimizers", "evaluation", "workers", "archive", "search", "runs", "cli"},
    "evomerge/optimizers": {"merging", "evaluation", "workers", "archive", "search", "runs", "cli"},
    "evomerge/spaces": {"optimizers", "evaluation", "workers", "archive", "search", "runs", "cli"},
    "evomerge/evaluation": {"merging", "spaces", "optimizers", "workers", "archive", "search", "runs", "cli"},
    "evomerge/workers": {"spaces", "optimizers", "archive", "search", "runs", "cli"},
    "evomerge/recipe.py": {"merging", "spaces", "optimizers", "evaluation", "workers", "archive", "search", "runs"},
    "evomerge/card.py": {"merging", "evaluation", "workers", "archive", "search", "runs", "cli"},
    "evomerge/licenses.py": {"merging", "evaluation", "workers", "archive", "search", "runs", "cli"},
    "evomerge/pareto.py": {"candidate", "archive", "search", "merging", "spaces"},
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_each_heavy_dependency_has_one_owner() -> None:
    for path in PACKAGE.rglob("*.py"):
        for dependency, owners in OWNERS.items():
            uses = any(name.split(".")[0] == dependency for name in imports(path))
            assert not uses or str(path.relative_to(PACKAGE)) in owners, f"{path} imports {dependency}"


def test_what_another_environment_runs_needs_nothing_of_ours() -> None:
    found = {name.split(".")[0] for name in imports(PACKAGE / "evaluation" / "vllm_server.py")}
    assert found <= {*sys.stdlib_module_names, "torch", "vllm"}


def test_no_import_goes_against_the_stream() -> None:
    for place, forbidden in NEVER.items():
        root = PACKAGE.parent / place
        for path in root.rglob("*.py") if root.is_dir() else [root]:
            for name in imports(path):
                part = name.removeprefix("evomerge.").split(".")[0] if name.startswith("evomerge.") else ""
                assert part not in forbidden, f"{path} imports {name}"


def test_nothing_opens_pickles_or_runs_remote_code() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert not {"pickle", "torch.load"} & imports(path), path
        assert "torch.load(" not in text, path
        assert "trust_remote_code=True" not in text, path
