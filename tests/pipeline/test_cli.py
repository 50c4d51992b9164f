"""The command line: what it writes, and that a mistake is one line."""

import os
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

from f2llm.config import read_yaml
from f2llm.pipeline.notebook import code_of


def f2llm(*arguments, cwd=ROOT):
    """The finished process of `python -m f2llm ...`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "f2llm", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_sizes_are_listed_with_the_chosen_one_marked(config, params):
    done = f2llm("sizes")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("v1 ", "v2 "))]
    assert [row[1] for row in rows if row[0] == "v2"] == list(params["sizes"])
    assert [row[1] for row in rows if row[0] == "v1"] == params["recipes"]["v1"]["sizes"]
    (chosen,) = (row for row in rows if row[-1] == "model.size")
    assert chosen[:2] == [params["recipe"], params["model"]["size"]]
    nano = next(row for row in rows if row[:2] == ["v2", "nano"])
    assert nano[2:5] == [
        str(config.backbone.hidden_size),
        str(config.backbone.num_hidden_layers),
        str(config.backbone.intermediate_size),
    ]


def test_sizes_as_csv_are_numbers_alone():
    done = f2llm("sizes", "--csv")
    assert done.returncode == 0, done.stderr
    heading, *lines = done.stdout.splitlines()
    assert heading.startswith("recipe,size,hidden,") and len(lines) == 13
    assert {line.count(",") for line in lines} == {heading.count(",")} == {12}
    assert "v2,330M,896,16,2560,16,8,128,334349184,2e-05,3,512,0.6B" in lines


def test_a_size_too_large_for_this_machine_is_stopped_before_it_begins(params, tmp_path):
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params | {"model": {"size": "14B"}}))
    for command in (("config", "14B", "build/config.yaml"), ("run", "05_stage2"), ("teacher", "models/teacher")):
        done = f2llm(*command, cwd=tmp_path)
        assert done.returncode == 1 and done.stdout == "", done.stdout
        assert done.stderr.startswith("error: this machine cannot train size 14B, nothing was run. By estimate")
        assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "dvc.yaml", "params.yaml"]


def test_checking_a_configuration_and_a_machine_imports_no_torch(params, tmp_path):
    """It takes seconds, and a mistake is to be shown at once."""
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    command = [sys.executable, "-X", "importtime", "-m", "f2llm", "config", "14B", "build/config.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    lines = done.stderr.decode().splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert lines[-1].startswith("error: this machine cannot train size 14B")
    assert "pydantic" in imported and not {"torch", "transformers", "mteb"} & imported


def test_an_error_says_how_to_get_params_yaml_back_where_it_differs_from_the_last_commit(params, tmp_path):
    remedy = "as an experiment leaves it: git checkout params.yaml takes its values back"
    (tmp_path / "dvc.yaml").touch()
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    assert remedy not in f2llm("config", "nanno", cwd=tmp_path).stderr, "without git"
    for arguments in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    assert remedy not in f2llm("config", "nanno", cwd=tmp_path).stderr, "unchanged"
    path.write_text(yaml.safe_dump(params | {"seed": -1}))
    for command in (("config", "nano", "build/config.yaml"), ("config",), ("run", "05_stage2"), ("teacher", "out")):
        done = f2llm(*command, cwd=tmp_path)
        assert done.stderr.startswith("error: params.yaml: seed is -1, but must be 0 or more; params.yaml differs")
        assert done.returncode == 1 and done.stderr.rstrip().endswith(remedy)
        assert len(done.stderr.strip().splitlines()) == 1


def test_config_prints_any_size_whatever_the_machine():
    done = f2llm("config", "14B")
    assert done.returncode == 0, done.stderr
    values = yaml.safe_load(done.stdout)
    assert (values["name"], values["backbone"]["from"], values["stage1"]["learning_rate"]) == ("14B", "hub", 5e-6)
    assert list(values)[:4] == ["name", "recipe", "seed", "machine"]


def test_config_writes_the_resolved_configuration(config, tmp_path):
    assert f2llm("config", "nano", tmp_path / "build" / "config.yaml").returncode == 0
    values = read_yaml(tmp_path / "build" / "config.yaml")
    assert values["name"] == "nano"
    assert values["stage1"]["learning_rate"] == config.stage1.learning_rate


@pytest.mark.parametrize(
    ("arguments", "cwd", "message"),
    [
        (("config", "nanno", "x"), ROOT, "error: model.size is 'nanno'"),
        (("config", "nanno"), ROOT, "error: model.size is 'nanno', but params.yaml offers only: nano, smollm2, 0.6B"),
        (("sizes",), None, "error: no dvc.yaml in"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(tmp_path, arguments, cwd, message):
    done = f2llm(*arguments, cwd=cwd or tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(message)
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (ROOT / "x").exists()


def test_a_missing_notebook_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.ipynb is missing; remedy: git checkout -- "):
        code_of(tmp_path / "absent.ipynb")


def test_a_notebook_that_does_not_exist_is_named_before_anything_is_made():
    done = f2llm("run", "06_prnue")
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith(
        "error: there is no notebooks/06_prnue.ipynb; did you mean '06_prune'?; remedy: one of"
    )


def test_commands_work_from_a_subfolder_and_leave_nothing_there(params, tmp_path):
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    (tmp_path / "below" / "deeper").mkdir(parents=True)
    cwd = tmp_path / "below" / "deeper"
    done = f2llm("config", "nano", "../config.yaml", cwd=cwd)
    assert done.returncode == 0 and read_yaml(tmp_path / "below" / "config.yaml")["name"] == "nano", done.stderr
    done = f2llm("code", "../../code", cwd=cwd)
    assert done.returncode == 0 and len(list((tmp_path / "code").iterdir())) == 11, done.stderr
    done = f2llm("fetch", "--set", "data.from=released", "--set", "data.only=[sqad]", cwd=cwd)
    assert "did you mean 'squad'" in done.stderr
    done = f2llm("run", "06_prune", cwd=cwd)
    assert done.returncode == 1 and done.stderr.startswith("error: notebooks/06_prune.ipynb, cell ")
    assert (tmp_path / "runs" / "06_prune.ipynb").exists(), "vacuous: it did not run"
    assert list(cwd.iterdir()) == [] and sorted(path.name for path in cwd.parent.iterdir()) == ["config.yaml", "deeper"]


# Data -------------------------------------------------------------------------------------------


def test_check_says_whether_a_file_is_usable(tmp_path):
    good, bad = tmp_path / "good.csv", tmp_path / "bad.csv"
    good.write_text("query,passage\nwhere?,here\nwhen?,now\n")
    bad.write_text("query,passage\nwhere?,\n,now\n")
    done = f2llm("check", good, "--instruction", "Find it.")
    assert done.returncode == 0 and "\nusable\nentry for data/sources.yaml" in done.stdout, done.stderr
    assert "Instruct: Find it." in done.stdout.replace("|", ""), "the prompt is shown as the model sees it"
    done = f2llm("check", bad)
    assert done.returncode == 1 and "empty text: 2" in done.stdout
    assert "bad.csv, row 1, passage" in done.stdout and "bad.csv, row 2, query" in done.stdout
    done = f2llm("check", tmp_path / "absent.csv")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "does not exist" in done.stderr


def test_fetch_says_what_it_would_need_and_why_it_cannot(tmp_path):
    done = f2llm("fetch")
    assert done.returncode == 0 and "data.from is embedded: no data to fetch" in done.stdout
    mirror = f"data.mirror={tmp_path / 'mirror'}"
    done = f2llm("fetch", "--set", "data.from=released", "--set", "data.only=[squad, ocgi]", "--set", mirror)
    assert done.returncode == 1 and "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids the network; remedy" in done.stderr
    done = f2llm("fetch", "--set", "data.from=released", "--set", "data.only=[squat]")
    assert done.returncode == 1 and "did you mean 'squad'" in done.stderr
    done = f2llm("fetch", "0.6B", "--set", "data.from=embedded", "--set", mirror)
    assert done.returncode == 1 and "forbids the network; remedy" in done.stderr, "its models are of the hub"
    done = f2llm(
        "fetch", "0.6B", "--recipe", "v1", "--set", "teacher=none", "--set", "data.from=embedded", "--set", mirror
    )
    assert done.returncode == 1 and "forbids the network; remedy" in done.stderr
    done = f2llm("fetch", "80M", "--recipe", "v1")
    assert done.returncode == 1 and "model.size under recipe v1 is '80M'" in done.stderr
    assert not (tmp_path / "mirror").exists()
    done = f2llm("fetch", "--set", "data.from")
    assert done.returncode == 1 and "is not of the form section.key=value" in done.stderr


def test_a_folder_of_released_files_is_taken_over_and_verified(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("squad", "ocgi", "ocgi_part2"):
        (theirs / f"{name}.parquet").write_bytes(name.encode())
    settings = ["--set", "data.from=released", "--set", f"data.mirror={tmp_path / 'mirror'}"]
    settings += ["--set", "data.only=[squad, ocgi]"]
    done = f2llm("fetch", *settings, "--adopt", theirs)
    assert done.returncode == 0, done.stderr
    done = f2llm("fetch", *settings, "--verify")
    assert done.returncode == 0 and "unchanged" in done.stdout
    done = f2llm("fetch", *settings, "--adopt", theirs, "--set", "data.revision=null")
    assert done.returncode == 1 and "data.revision is null, but --adopt must know" in done.stderr
    (tmp_path / "mirror" / "codefuse-ai" / "F2LLM-v2" / "ocgi.parquet").unlink()
    done = f2llm("fetch", *settings, "--verify")
    assert done.returncode == 1 and "ocgi.parquet is missing" in done.stdout
