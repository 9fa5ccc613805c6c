"""The notebook in the docs runs, and a kernel shows runs as HTML."""

import json
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*:nbformat.warnings.MissingIDFieldWarning")
def test_the_notebook_of_the_docs_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(REPOSITORY / "docs" / "notebook.ipynb", as_version=4)
    for name in ("search_spaces", "evals"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert any("<progress" in html and "finished" in html for html in shown)
    assert any("never saw" in html for html in shown)
    assert (tmp_path / "runs" / "notebook" / "report.html").exists()


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = json.loads((REPOSITORY / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") for cell in notebook["cells"])
