"""The first call of every notebook; it works in JupyterLab and papermill, from any folder of a clone."""

import os
import warnings
from pathlib import Path

from ..config import Config, load_config, root


def boot(size: str | None = None) -> Config:
    """The configuration of a size (None: model.size of params.yaml); changes the working folder to the repository's.

    Also sets the style of plots. ValueError outside a clone, or if f2llm was imported from another clone than the
    notebook's.
    """
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
