"""JupyterLab, in a browser: opening, running, editing around and saving a stage's notebook never changes its code."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

pytestmark = pytest.mark.pipeline
NOTEBOOK = "10_ablations.ipynb"  # it needs no model, only a table that is in git
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the working tree, with the repository's package to import and its stages' code extracted."""
    folder = tmp_path_factory.mktemp("lab") / "clone"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for command in (["git", "init", "-q"], ["git", "add", "-A"], ["git", "commit", "-qm", "clone"]):
        subprocess.run(command, cwd=folder, env=environment(folder), check=True)
    return folder


def environment(folder: Path) -> dict:
    """The variables of a terminal in which this clone is installed, with Jupyter's files in a folder of its own."""
    commits = {f"GIT_{who}_{what}": "t@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    home = {
        name: str(folder.parent / "jupyter") for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "PYTHONPATH": str(folder), "DVC_NO_ANALYTICS": "1"}
    return {key: value for key, value in os.environ.items() if key != "MPLBACKEND"} | commits | home | own


def dvc(folder: Path, *words: str) -> str:
    command = [sys.executable, "-m", "dvc", *words]
    return subprocess.run(
        command, cwd=folder, env=environment(folder), check=True, capture_output=True, text=True
    ).stdout


def extracted(folder: Path) -> dict[str, bytes]:
    """{stage: its code}, extracted by the stage `code`."""
    dvc(folder, "repro", "code")
    return {path.name: path.read_bytes() for path in (folder / "build" / "code").iterdir()}


def stale(folder: Path) -> set[str]:
    """Stages of which a dependency differs from dvc.lock, where that was made by this clone."""
    status = json.loads(dvc(folder, "status", "--json", "config", "code", "teacher"))
    return {stage for stage, facts in status.items() if any("changed deps" in fact for fact in facts)}


@contextmanager
def jupyterlab(folder: Path):
    """The address of a JupyterLab that shows the clone's notebooks; its token is the last part."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, log = secrets.token_hex(16), (folder.parent / "lab.log").open("w")
    options = [
        "--no-browser",
        f"--ServerApp.port={port}",
        f"--IdentityProvider.token={token}",
        "--ServerApp.ip=127.0.0.1",
    ]
    options += ["--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None", "--ServerApp.allow_root=True"]
    command = [sys.executable, "-m", "jupyterlab", *options, "notebooks"]
    process = subprocess.Popen(command, cwd=folder, env=environment(folder), stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 90
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=5).close()
                break
            assert process.poll() is None and time.monotonic() < deadline, (folder.parent / "lab.log").read_text()
            time.sleep(0.3)
        yield f"{address}/lab/tree/{NOTEBOOK}?token={token}"
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def browser_of(playwright):
    """A headless Chromium, or None where there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        return playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
    except Exception as error:  # playwright's own browser is not installed
        if found:
            raise
        pytest.skip(f"no Chromium is installed ({str(error).splitlines()[0]})")


def test_running_editing_around_and_saving_in_a_browser_leaves_the_code_as_it_was(clone):
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: make lab")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path, before = clone / "notebooks" / NOTEBOOK, extracted(clone)
    dvc(clone, "repro", "teacher")
    original = path.read_bytes()
    with playwright.sync_playwright() as started, jupyterlab(clone) as address:
        browser = browser_of(started)
        page = browser.new_page()
        page.goto(address)

        def command(name: str) -> None:
            page.evaluate("async name => { await window.jupyterapp.commands.execute(name) }", name)

        page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell", timeout=120_000)
        page.wait_for_function(
            "() => window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'"
        )
        command("notebook:run-all-cells")
        command("notebook:insert-cell-below")  # stays empty
        command("notebook:insert-cell-below")
        page.keyboard.press("Enter")
        page.keyboard.type("# a remark that runs nothing")
        page.keyboard.press("Escape")
        command("notebook:insert-cell-below")
        command("notebook:change-cell-to-raw")
        command("docmanager:save")
        page.wait_for_function(
            "() => { const content = window.jupyterapp.shell.currentWidget; return !content.context.model.dirty }"
        )
        browser.close()
    after = nbformat.read(path, as_version=4)
    code = [cell for cell in after.cells if cell.cell_type == "code"]
    assert path.read_bytes() != original and any(cell.outputs for cell in code), "vacuous: it was not run, or not saved"
    assert not [out for cell in code for out in cell.outputs if out.output_type == "error"]
    assert any("a remark that runs nothing" in cell.source for cell in code), "vacuous: nothing was typed"
    assert any(cell.cell_type == "raw" for cell in after.cells), "vacuous: no cell became raw"
    assert stale(clone) == {"code"}
    assert extracted(clone) == before and stale(clone) == set()
    assert "Stage 'teacher' didn't change, skipping" in dvc(clone, "repro", "teacher")
