"""Run the notebook from top to bottom and keep its outputs: `python docs/run_notebook.py [docs/quickstart.ipynb]`.

It is run in an empty folder, so that what its cells write stays out of the repository; the file itself is replaced only
when every cell has run. Needs the extra `docs`; takes a few minutes.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbconvert.preprocessors import ExecutePreprocessor

from headtune.analysis.utils.files import write_text

QUIET = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def main(path: Path) -> None:
    os.environ.update(QUIET)
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        run = ExecutePreprocessor(timeout=1800, kernel_name="python3")
        run.preprocess(notebook, {"metadata": {"path": folder}})
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode()  # when each cell ran is of no use to a reader
        if cell.cell_type == "code":
            # Progress bars and warnings go to stderr, and differ from run to run.
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    write_text(path, nbformat.writes(notebook) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_name("quickstart.ipynb"))
