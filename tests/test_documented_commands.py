"""Every command of the documentation is one that its program takes, with values that params.yaml takes.

What a command does is tested where its code is; here nothing runs.
"""

import importlib.util
import re
import shlex
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import typer
import yaml
from conftest import ROOT
from dvc.cli.parser import get_main_parser
from dvc.utils.hydra import apply_overrides

from f2llm.config import read_yaml, resolve
from f2llm.pipeline.cli import app

DOCUMENTS = [ROOT / "README.md", ROOT / "data" / "README.md", ROOT / "benchmarks" / "README.md"]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "notebooks").rglob("*.ipynb"))
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PLACEHOLDERS = {"NAME": "a-name", "MODEL": "models/stage2", "FOLDER": "a-folder"}


def commands_of(path) -> list[str]:
    """The commands of fenced blocks, and those in backticks that begin with a program; continued lines are joined."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    if path.suffix == ".ipynb":
        cells = [cell for cell in yaml.safe_load(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n".join("".join(cell["source"]) for cell in cells)
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [re.sub(r"\s+#( .*)?$", "", line).strip() for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`((?:f2llm|dvc|make) [^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line for line in (*lines, *inline) if line and not line.startswith("#")]


COMMANDS = [(path.relative_to(ROOT).as_posix(), line) for path in DOCUMENTS for line in commands_of(path)]


def test_commands_are_found():
    programs = {line.split()[0] for _, line in COMMANDS}
    assert len(COMMANDS) > 60 and {"make", "f2llm", "dvc", "python", "sbatch"} <= programs


@pytest.mark.parametrize(("where", "line"), COMMANDS, ids=[f"{where}: {line[:50]}" for where, line in COMMANDS])
def test_a_documented_command_is_one_that_its_program_takes(where, line):
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line)]
    while "=" in words[0]:  # VARIABLE=value before the program
        words = words[1:]
    check = PROGRAMS.get(words[0])
    assert check, f"{where}: what program is {words[0]!r}?"
    check(words[1:])


def check_f2llm(words: list[str]) -> None:
    """The verb is there and takes these options. Prose may leave out what the verb needs, and an option's value."""
    commands = typer.main.get_command(app).commands
    assert words[0] in commands, f"no verb {words[0]}"
    try:
        commands[words[0]].make_context(words[0], words[1:] + ["a-value"] * words[-1].startswith("--"))
    except Exception as error:
        if type(error).__name__ != "MissingParameter":  # of click, which newer versions of typer bring with them
            raise


def check_dvc(words: list[str]) -> None:
    """DVC parses it, and params.yaml takes the values that an experiment sets."""
    parsed = get_main_parser().parse_args(words)
    settings = getattr(parsed, "params", None) or []
    if parsed.cmd in ("exp", "experiments") and settings:
        with TemporaryDirectory() as folder:
            path = Path(shutil.copy(ROOT / "params.yaml", folder))
            apply_overrides(path, settings)
            resolve(read_yaml(path))


def check_make(words: list[str]) -> None:
    assert {word for word in words if "=" not in word} <= TARGETS


def check_python(words: list[str]) -> None:
    """python -m MODULE: the module is there; for this project's own, also after torch.distributed.run."""
    modules = [words[place + 1] for place, word in enumerate(words) if word == "-m"]
    assert modules and all(importlib.util.find_spec(module) for module in modules)


def check_files(words: list[str]) -> None:
    """Files of configs/ that it names are there."""
    for word in words:
        assert not word.startswith("configs/") or (ROOT / word).is_file(), word


PROGRAMS = {"f2llm": check_f2llm, "dvc": check_dvc, "make": check_make, "python": check_python}
PROGRAMS |= {"sbatch": check_files}
PROGRAMS |= dict.fromkeys(("git", "source", "pip", "hf", "cd"), lambda words: None)
