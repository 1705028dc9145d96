"""The notebook tells its story from the first cell to the last."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "digits.ipynb"


def test_it_is_stored_without_outputs():
    code = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    assert code
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_it_runs_and_shows_the_saving(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient")
    pytest.importorskip("ipykernel", reason="needs ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=240, resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    errors = [float(e) for e in re.findall(r"a step +([\d.]+) % wrong", printed)]
    assert len(errors) == 2
    assert max(errors) < 30
    assert re.search(r"-?\d+ % of the time saved\nexpected depth 11\.0 of 15", printed)
    shares = re.findall(r"p = ([\d.]+) +#+ ([\d.]+)", printed)
    assert len(shares) == 15
    for p, share in ((float(p), float(share)) for p, share in shares):
        assert abs(p - share) < 4 * (p * (1 - p) / 160) ** 0.5
    assert re.search(r"times p_l: [\d.]+ % wrong; without: [\d.]+ % wrong", printed)
