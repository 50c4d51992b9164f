"""params.yaml to one checked configuration: merging, every kind of mistake, and numbers as DVC writes them."""

import copy
import re
from dataclasses import FrozenInstanceError

import pytest
import yaml
from conftest import ROOT

from f2llm.config import Config, load_config, overrides_of, read_yaml, resolve, root, write_config


def place(params, path, value):
    """Set params[a][b][c] = value for the path 'a.b.c'."""
    *tables, key = path.split(".")
    for name in tables:
        params = params[name]
    params[key] = value


# Resolving --------------------------------------------------------------------------------------


def test_every_size_of_params_yaml_resolves(params):
    for size in params["sizes"]:
        config = resolve(params, size)
        assert isinstance(config, Config) and config.name == size
    assert resolve(params).name == params["model"]["size"]


def test_a_size_goes_over_its_recipe_and_an_override_over_both(params):
    recipe, size = params["recipes"][params["recipe"]], params["sizes"]["nano"]
    config = resolve(params, "nano")
    assert config.stage1.temperature == recipe["stage1"]["temperature"]
    assert config.stage1.learning_rate == size["stage1"]["learning_rate"] != recipe["stage1"]["learning_rate"]
    assert config.mine.keep == size["mine"]["keep"] != recipe["mine"]["keep"]
    assert config.mine.skip == recipe["mine"]["skip"]
    params["override"] = {"stage1": {"temperature": 0.1}}
    assert resolve(params, "nano").stage1.temperature == 0.1
    changed = resolve(params, "nano", {"stage1": {"temperature": 0.2}, "seed": 7})
    assert (changed.stage1.temperature, changed.seed) == (0.2, 7)
    assert changed.stage2 == config.stage2


def test_a_size_with_a_base_takes_the_rest_from_it(params):
    params["sizes"]["small"] = {"base": "nano", "prune": {"calibration_texts": 11}}
    small, nano = resolve(params, "small"), resolve(params, "nano")
    assert (small.name, small.prune.calibration_texts) == ("small", 11)
    assert (small.backbone, small.stage1, small.prune.students) == (nano.backbone, nano.stage1, nano.prune.students)


def test_resolving_changes_neither_params_nor_an_earlier_configuration(params):
    before = copy.deepcopy(params)
    config = resolve(params, "nano", {"stage1": {"max_steps": 3}})
    assert params == before
    with pytest.raises(FrozenInstanceError):
        config.seed = 1


def test_sizes_of_digits_stay_names(params):
    for size in ("1.7B", "8B", "330M"):
        params["sizes"][size] = params["sizes"]["nano"]
        params["model"]["size"] = size
        assert resolve(params).name == size


# Mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.size", "nanno", "model.size is 'nanno', but params.yaml offers only: nano; did you mean 'nano'?"),
        ("model", {"width": 3}, "model is {'width': 3}, but must be a table with the one key size"),
        ("recipe", "v3", "recipe is 'v3', but params.yaml offers only: v2"),
        ("colour", "red", "params.yaml: unknown key 'colour'"),
        ("recipes.v2.stage1.temprature", 0.1, "unknown key 'temprature'; did you mean 'temperature'?"),
        ("sizes.nano.minne", {}, "unknown key 'minne'; did you mean 'mine'?"),
        ("sizes.nano.base", "micro", "sizes.nano.base is 'micro', but params.yaml offers only: nano"),
        ("override", 3, "override is 3, but must be a table of keys and values"),
        ("seed", "0", "seed is '0' (str), but must be of type int"),
        ("seed", True, "seed is True (bool), but must be of type int"),
        ("sizes.nano.stage1.max_steps", 1.5, "stage1.max_steps is 1.5 (float), but must be of type int"),
        ("sizes.nano.stage1.learning_rate", "fast", "stage1.learning_rate is 'fast' (str), but must be of type float"),
        ("recipes.v2.stage1.instructions", "no", "stage1.instructions is 'no' (str), but must be of type bool"),
        ("recipes.v2.stage1.betas", 0.9, "stage1.betas is 0.9, but must be a list of float"),
        ("sizes.nano.evaluate.dims", ["a"], "evaluate.dims is 'a' (str), but must be of type int"),
        ("sizes.nano.backbone", "qwen", "backbone is 'qwen', but must be a table of keys and values"),
    ],
)
def test_a_wrong_key_or_type_is_named_with_what_is_allowed(params, path, value, message):
    place(params, path, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(params)


@pytest.mark.parametrize(
    ("path", "missing"),
    [("seed", "seed"), ("recipes.v2.stage1.temperature", "temperature"), ("sizes.nano.backbone.vocab", "vocab")],
)
def test_a_missing_key_is_named(params, path, missing):
    *tables, key = path.split(".")
    table = params
    for name in tables:
        table = table[name]
    del table[key]
    with pytest.raises(ValueError, match=f"key '{missing}' is missing; remedy: add it, nothing has a default"):
        resolve(params)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"stage1": {"learning_rate": -1.0}}, "stage1.learning_rate is -1.0, but must be above 0"),
        ({"stage1": {"learning_rate": 0}}, "stage1.learning_rate is 0.0, but must be above 0"),
        ({"stage2": {"temperature": float("nan")}}, "stage2.temperature is nan"),
        ({"stage1": {"weight_decay": -0.1}}, "stage1.weight_decay is -0.1, but must be 0 or more"),
        ({"stage2": {"document_instruction_share": 1.1}}, "is 1.1, but is a share and must not exceed 1"),
        ({"data": {"held_out_percent": 60}}, "data.held_out_percent is 60, but must be from 1 to 50"),
        (
            {"data": {"from": "embeded"}},
            "data.from is 'embeded', but must be one of: embedded, released, sources, local; did you mean 'embedded'",
        ),
        ({"data": {"revision": "main"}}, "data.revision is 'main', but must be a commit of the hub: 40"),
        ({"data": {"licences": "free"}}, "data.licences is 'free', but must be one of: all, known, commercial"),
        ({"data": {"deduplicate": True}}, "data.deduplicate is True (bool), but must be of type str"),
        ({"mine": {"miner": "embedder:"}}, "mine.miner is 'embedder:', but must be tfidf, embedder:<folder> or"),
        ({"mine": {"miner": "bm25"}}, "mine.miner is 'bm25', but must be tfidf"),
        ({"mine": {"anchor": "text"}}, "mine.anchor is 'text', but must be one of: query, passage"),
        (
            {"stage1": {"in_batch_tasks": ["ranking"]}},
            "in_batch_tasks has ['ranking'], but tasks are: retrieval",
        ),
        ({"stage1": {"betas": [0.9]}}, "stage1.betas is [0.9], but must be two numbers below 1"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_rule(params, override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(params, "nano", override)


def test_values_that_contradict_each_other_are_named_together(params):
    config = resolve(params, "nano")
    dim, keep, range_max = config.backbone.hidden_dim, config.mine.keep, config.mine.range_max
    contradictions = [
        ({"backbone": {"query_heads": 3}}, "query_heads is 3, but must be a multiple of key_value_heads, 2"),
        ({"backbone": {"head_dim": 7}}, "head_dim is 7"),
        (
            {"mine": {"keep": range_max}},
            f"keep is {range_max}, but only {range_max - config.mine.skip} candidates",
        ),
        ({"stage1": {"min_learning_rate": 1.0}}, "min_learning_rate is 1.0, but must not exceed learning_rate"),
        ({"stage1": {"global_batch_size": 1}}, "global_batch_size is 1"),
        ({"stage1": {"hard_negatives": {"retrieval": keep + 1}}}, f"retrieval is {keep + 1}, but only {keep} are kept"),
        (
            {"stage2": {"matryoshka_min_dim": dim + 1}},
            f"min_dim is {dim + 1}, but the embedding has only {dim}",
        ),
        (
            {"stage2": {"hard_negatives": {"clustering": 0}}},
            "stage2.hard_negatives.clustering is 0, but without them clustering has no loss at all",
        ),
        (
            {"data": {"cap_per_source": 10}},
            "data.cap_per_source is 10, but stage2.cap_per_source asks for 80000",
        ),
        ({"stage2": {"max_tokens": 1}}, "max_tokens is 1, but one token and EOS are the least: 2"),
        ({"evaluate": {"dims": [dim + 1]}}, f"evaluate.dims has {dim + 1}, but the embedding has only {dim}"),
        (
            {"prune": {"students": {"big": {"hidden_dim": dim + 1, "mlp_dim": 8, "layers": 1}}}},
            f"prune.students.big.hidden_dim is {dim + 1}, but pruning only removes: at most the backbone's {dim}",
        ),
    ]
    for override, message in contradictions:
        with pytest.raises(ValueError, match=re.escape(message)):
            resolve(params, "nano", override)


def test_settings_of_the_command_line_are_overrides(params):
    settings = overrides_of(["data.from=released", "data.only=[squad, snli]", "stage1.learning_rate=5e-3"])
    assert settings == {"data": {"from": "released", "only": ["squad", "snli"]}, "stage1": {"learning_rate": 5e-3}}
    assert resolve(params, "nano", settings).data.only == ["squad", "snli"]
    for wrong in ("data.from", "from=released", "data.=1", "=1"):
        with pytest.raises(ValueError, match=r"is not of the form section\.key=value"):
            overrides_of([wrong])
    with pytest.raises(ValueError, match="the value is not valid YAML"):
        overrides_of(["data.only=[a"])


# Files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1e-05", 1e-5),
        ("1.0e-5", 1e-5),
        ("4E3", 4000.0),
        ("-.5", -0.5),
        ("3", 3),
        ("1.7B", "1.7B"),
        ("0.6B", "0.6B"),
        ("330M", "330M"),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("2026-01-02", "2026-01-02"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("null", None),
    ],
)
def test_values_are_read_as_dvc_reads_them(tmp_path, text, value):
    (tmp_path / "p.yaml").write_text(f"key: {text}\n")
    read = read_yaml(tmp_path / "p.yaml")["key"]
    assert read == value and type(read) is type(value)


def test_a_missing_or_invalid_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"params\.yaml is missing; remedy: git checkout -- params\.yaml"):
        read_yaml(tmp_path / "params.yaml")
    path = tmp_path / "params.yaml"
    wrong = {b"a: [1": "not valid YAML.*line", b"\xff\xfe\x00": "not valid YAML", b"- 1": "must be a table"}
    for content, message in wrong.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"(?s)params\\.yaml.*{message}"):
            read_yaml(path)


def test_a_written_configuration_reads_back_as_the_same_one(config, tmp_path):
    write_config(config, tmp_path / "build" / "config.yaml")
    values = read_yaml(tmp_path / "build" / "config.yaml")
    assert values["backbone"]["from"] == "embedded" and "source" not in values["backbone"]
    sections = {key: value for key, value in values.items() if key not in ("name", "recipe", "seed", "machine")}
    params = {"model": {"size": "nano"}, "override": {}, "recipes": {config.recipe: {}}, "sizes": {"nano": sections}}
    assert resolve(params | {key: values[key] for key in ("recipe", "seed", "machine")}) == config


def keys_of(value):
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from keys_of(item)


def test_no_key_has_a_name_that_dvc_leaves_out_of_its_run_cache(params, config, tmp_path):
    write_config(config, tmp_path / "config.yaml")
    written = list(keys_of(read_yaml(tmp_path / "config.yaml")))
    assert params.pop("model").keys() == {"size"}, "the only key of that name, which no stage depends on"
    for keys in (written, list(keys_of(params))):
        assert len(keys) > 50
        assert not {"size", "nfiles"} & set(keys)


def test_load_config_reads_the_params_of_the_repository_from_any_folder_in_it(monkeypatch, tmp_path, params):
    monkeypatch.chdir(ROOT / "tests")
    assert root() == ROOT
    assert load_config("nano", seed=9) == resolve(params, "nano", {"seed": 9})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no dvc\.yaml in .* or above; remedy"):
        load_config()
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params | {"seed": 5}))
    assert load_config().seed == 5, "a copy, such as a temporary experiment, has its own"
