"""The promises of SECURITY.md."""

import ast
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from f2llm.config import read_yaml
from f2llm.data.fetch import adopt, models_needed
from f2llm.data.mirror import Mirror
from f2llm.mining.encoders import SentenceTransformerMiner
from f2llm.pipeline.notebook import code_of
from f2llm.store.params import Loader

PROGRAMS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in ROOT.glob("f2llm/**/*.py")}
PROGRAMS |= {path.name: code_of(path) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
READS_PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NETWORK = {"requests", "httpx", "urllib", "http", "socket", "aiohttp", "ftplib"}
OF_THE_HUB = {"snapshot_download", "hf_hub_download", "HfApi", "load_dataset"}


class Harmful:
    """A pickle of this writes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def nodes(kind: type) -> list[tuple[str, ast.AST]]:
    """(program, node) of all nodes of a kind in f2llm and the notebooks."""
    return [(name, node) for name, text in PROGRAMS.items() for node in ast.walk(ast.parse(text)) if type(node) is kind]


def called(node: ast.Call) -> str:
    """The name that is called: 'torch.load' of torch.load(...)."""
    return ast.unparse(node.func)


def imported() -> dict[str, set[str]]:
    """{program: the packages and names that it imports}."""
    found = {name: set() for name in PROGRAMS}
    for name, node in nodes(ast.Import):
        found[name] |= {part for alias in node.names for part in alias.name.split(".")[:1]}
    for name, node in nodes(ast.ImportFrom):
        found[name] |= {alias.name for alias in node.names} | ({(node.module or "").split(".")[0]} - {""})
    return found


def test_the_scan_sees_programs_and_calls():
    assert len(PROGRAMS) > 60 and len(nodes(ast.Call)) > 2_000
    assert any(called(node) == "AutoModel.from_pretrained" for _, node in nodes(ast.Call))
    assert "snapshot_download" in imported()["f2llm/data/fetch.py"]


def test_no_program_trusts_remote_code():
    assert not [name for name, node in nodes(ast.keyword) if node.arg == "trust_remote_code"]
    assert not [name for name, text in PROGRAMS.items() if re.search("trust_remote_code\\W+True", text)]


def test_nothing_is_unpickled_and_no_text_is_run_as_code():
    calls = [(name, called(node)) for name, node in nodes(ast.Call)]
    assert not [(name, what) for name, what in calls if what in RUNS_CODE | {"torch.load", "os.system", "os.popen"}]
    assert not [name for name, names in imported().items() if names & READS_PICKLES]
    assert not [name for name, node in nodes(ast.keyword) if node.arg in ("allow_pickle", "shell")]
    assert not [what for _, what in calls if what.endswith(("read_pickle", "unsafe_load", "full_load"))]


def test_yaml_is_read_by_a_loader_that_makes_no_objects(tmp_path):
    loads = [(name, node) for name, node in nodes(ast.Call) if called(node) == "yaml.load"]
    assert loads and all(ast.unparse(node.args[1]) == "Loader" for _, node in loads)
    assert not [tag for tag in Loader.yaml_constructors if tag and "python" in tag]
    assert not [tag for tag in Loader.yaml_multi_constructors if tag and "python" in tag]
    path = tmp_path / "params.yaml"
    path.write_text(f"seed: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'harm'}]\n")
    with pytest.raises(ValueError, match="could not determine a constructor"):
        read_yaml(path)
    assert not (tmp_path / "harm").exists()


def test_only_fetch_uses_the_network():
    at_hub = {name for name, names in imported().items() if names & OF_THE_HUB}
    assert at_hub == {"f2llm/data/fetch.py", "f2llm/mining/encoders.py"}
    assert not {name for name, names in imported().items() if names & NETWORK} - {"f2llm/data/fetch.py"}
    (reads_cache,) = [
        node for name, node in nodes(ast.Call) if name.endswith("encoders.py") and called(node) == "snapshot_download"
    ]
    assert "local_files_only=True" in ast.unparse(reads_cache)


def test_everything_that_is_fetched_of_models_has_a_commit_and_is_no_code(params):
    from f2llm.config import resolve

    needed = [one for size in params["sizes"] for one in models_needed(resolve(params, size))]
    assert len(needed) > 8, "vacuous: nothing is fetched"
    unpinned = {
        size["backbone"]["name"] for size in params["sizes"].values() if "architecture" in size.get("backbone", {})
    }
    for repo_id, patterns, revision, _ in needed:
        assert re.fullmatch("[0-9a-f]{40}", revision or "") or repo_id in unpinned, "not of the papers' families"
        assert set(patterns) == {"*.json", "*.safetensors"}


def test_a_pickle_in_the_place_of_an_array_is_refused(tmp_path):
    path = tmp_path / "rows.npy"
    np.save(path, np.array([Harmful(tmp_path / "harm")], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        np.load(path, mmap_mode=None)  # as the kit calls it: without allow_pickle
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("folder", [".", "2_Dense"])
def test_a_miner_whose_weights_are_pickles_is_refused_before_they_are_read(tmp_path, folder):
    (tmp_path / "model" / folder).mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    if folder != ".":
        (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "model" / folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful(tmp_path / "harm")))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.* pickle.*remedy: "):
        SentenceTransformerMiner(str(tmp_path / "model"), max_tokens=8)
    assert not (tmp_path / "harm").exists()


def test_a_mirror_tells_a_change_of_one_byte(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "rows.parquet").write_bytes(b"0" * 1000)
    adopt(tmp_path / "mirror", "someone/rows", tmp_path / "theirs", "a" * 40)
    find = {"command": "f2llm fetch", "hashed": True}
    (path,) = Mirror(tmp_path / "mirror").require("someone/rows", ["*.parquet"], **find)
    path.write_bytes(b"0" * 999 + b"1")
    with pytest.raises(ValueError, match=r"rows\.parquet was changed"):
        Mirror(tmp_path / "mirror").require("someone/rows", ["*.parquet"], **find)
    assert Mirror(tmp_path / "mirror").verify()


def test_no_stage_reads_a_mirror_without_hashing():
    """Stage `config` alone looks at sizes only, to be quick."""
    for name, node in nodes(ast.Call):
        if called(node).endswith(("mirror.require", "held.require")) and name != "f2llm/pipeline/inputs.py":
            assert "hashed=True" in ast.unparse(node), name


def test_this_document_names_its_tests():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert "tests/test_security.py" in text and "Report a vulnerability" in text
    assert text.isascii(), "plain text"
    assert not re.search(r"[\w.]+@[\w.]+\.\w+", text), "no address that nobody reads"
