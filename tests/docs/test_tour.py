"""The notebook docs/tour.ipynb runs from top to bottom, and the file has its outputs."""

import json
import os
from typing import Any

import pytest

from tests.helpers.paths import ROOT

DOCS = ROOT / "docs"
TOUR = DOCS / "tour.ipynb"
# Besides EDM2_TOUR: fewer steps of sampling, a kimg of 128 images, fewer images to measure.
SMALL = {
    "steps=12, **options": "steps=2, **options",
    " * 1024,": " * 128,",
    "status=512,": "status=64,",
    "snapshot=1024,": "snapshot=128,",
    "SHARE), 12)": "SHARE), 4)",
}


def num_images(notebook: dict[str, Any]) -> int:
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_file_has_its_outputs_and_is_small() -> None:
    notebook = json.loads(TOUR.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))  # in one go
    assert all(output["output_type"] != "error" for cell in code for output in cell["outputs"])
    text = TOUR.read_text(encoding="utf-8")
    assert num_images(notebook) >= 6 and len(text) < 500_000
    assert "/home/" not in text and "/tmp/" not in text


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("EDM2_TOUR", "0.01")  # of the training and of the images that are measured
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    notebook = nbformat.read(TOUR, as_version=4)
    committed = num_images(notebook)
    for text, small in SMALL.items():
        (cell,) = (cell for cell in notebook.cells if text in cell.source)
        cell.source = cell.source.replace(text, small)
    nbclient.NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(DOCS)}}
    ).execute()
    assert num_images(notebook) == committed
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output
    )
    scores = [
        float(line.split()[-1]) for line in printed.splitlines() if line.startswith(("held-out", "trained", "the "))
    ]
    assert len(scores) == 5 and min(scores) > 0
