"""The first call of every notebook; it works in JupyterLab and papermill, from any folder of a clone."""

import ast
import os
import sys
import warnings
from pathlib import Path

from ..config import Config, load_config, root


def boot(size: str | None = None) -> Config:
    """The configuration of a size (None: model.size of params.yaml); changes the working folder to the repository's.

    Also sets the style of plots. ValueError outside a clone, if f2llm was imported from another clone than the
    notebook's, or if papermill was given a parameter other than `size`.
    """
    _refuse_other_parameters()
    folder, imported = root(), Path(__file__).resolve().parents[2]
    if imported != folder:
        raise ValueError(
            f"this notebook belongs to {folder}, but f2llm was imported from {imported}; "
            f"remedy: start Jupyter with {folder}/.venv (make lab), or pip install -e {folder}"
        )
    os.chdir(folder)
    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm then shows its bars as text
    import matplotlib.pyplot as plt

    plt.style.use(folder / "notebooks" / "f2llm.mplstyle")
    return load_config(size)


def _refuse_other_parameters() -> None:
    """ValueError for a parameter of papermill, which writes a cell `# Parameters` of assignments, besides `size`."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    for cell in shell.user_ns.get("In", []) if shell else []:
        if cell.startswith("# Parameters\n"):
            assigned = [node.targets[0].id for node in ast.parse(cell).body if isinstance(node, ast.Assign)]
            if unknown := [name for name in assigned if name != "size"]:
                raise ValueError(
                    f"papermill was given {', '.join(unknown)}, but a notebook's only parameter is size; remedy: all "
                    "other values are in params.yaml, as in dvc exp run -S '++override.stage1.epochs=1'"
                )
