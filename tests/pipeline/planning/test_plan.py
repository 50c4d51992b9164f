"""Presets are the published models, what they need is what one counts by hand, a machine too small says so."""

import csv
import io
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import ROOT, STAGE_NOTEBOOKS
from transformers import Qwen3Config, Qwen3Model

from f2llm.config import load_config, read_yaml, resolve
from f2llm.pipeline import cli
from f2llm.pipeline.planning import costs, plan
from f2llm.pipeline.planning.costs import num_parameters, rows_of, shape_of
from f2llm.pipeline.planning.plan import Here, sizes_of
from f2llm.store import hardware
from f2llm.store.hardware import Gpu

# The papers' tables. hidden, MLP, layers, query heads, key-value heads; parameters; rate, epochs, teacher
V2 = {
    "80M": (320, 2048, 8, 16, 8, 80_084_288, 4e-5, 4, "0.6B"),
    "160M": (640, 1536, 9, 16, 8, 159_185_024, 3e-5, 3, "0.6B"),
    "330M": (896, 2560, 16, 16, 8, 334_349_184, 2e-5, 3, "0.6B"),
    "0.6B": (1024, 3072, 28, 16, 8, 596_049_920, 1e-5, 2, "1.7B"),
    "1.7B": (2048, 6144, 28, 16, 8, 1_720_574_976, 9e-6, 2, "4B"),
    "4B": (2560, 9728, 36, 32, 8, 4_022_468_096, 7e-6, 2, ""),
    "8B": (4096, 12288, 36, 32, 8, 7_568_405_504, 6e-6, 2, ""),
    "14B": (5120, 17408, 40, 40, 8, 13_990_394_880, 5e-6, 2, ""),
}
V1 = {
    "0.6B": (1024, 3072, 28, 16, 8, 596_049_920, 1e-5, 2, ""),
    "1.7B": (2048, 6144, 28, 16, 8, 1_720_574_976, 9e-6, 2, ""),
    "4B": (2560, 9728, 36, 32, 8, 4_022_468_096, 8e-6, 2, ""),
}
PUBLISHED = [("v2", size, row) for size, row in V2.items()] + [("v1", size, row) for size, row in V1.items()]
COLUMNS = "recipe,size,hidden,layers,intermediate,heads,kv_heads,head_dim,parameters,learning_rate,epochs,global_batch"
H100 = [Gpu("NVIDIA H100 80GB HBM3", 79.6)]


@pytest.fixture(scope="module")
def of_recipe():
    """{recipe: {size: configuration}}"""
    params = read_yaml(ROOT / "params.yaml")
    return {recipe: {config.name: config for config in sizes_of(params, recipe)} for recipe in params["recipes"]}


def on_meta(shape):
    """A Qwen3 of a shape, without memory for its weights."""
    with torch.device("meta"):
        return Qwen3Model(Qwen3Config(**shape))


# The presets are what was published -------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "size", "row"), PUBLISHED)
def test_a_size_has_exactly_the_published_parameters(of_recipe, recipe, size, row):
    config = of_recipe[recipe][size]
    shape = shape_of(config, plan.student_of(config))
    model = on_meta(shape)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == row[5]
    assert num_parameters(**shape) == plan.own_parameters(config) == (count, count - model.embed_tokens.weight.numel())


def test_the_table_of_sizes_is_the_papers(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    cli.sizes(csv=True)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == f"{COLUMNS},teacher"
    rows = {(row["recipe"], row["size"]): row for row in csv.DictReader(io.StringIO(printed))}
    assert rows.keys() == {("v2", "nano"), ("v1", "nano"), *((recipe, size) for recipe, size, _ in PUBLISHED)}
    assert len(printed.splitlines()) == 1 + len(rows)
    names = ("hidden", "intermediate", "layers", "heads", "kv_heads", "parameters")
    for recipe, size, (*numbers, rate, epochs, teacher) in PUBLISHED:
        row = rows[recipe, size]
        assert [int(row[name]) for name in names] == numbers, (recipe, size)
        assert (float(row["learning_rate"]), int(row["epochs"]), row["teacher"]) == (rate, epochs, teacher)
        assert (row["global_batch"], row["head_dim"]) == ("512", "128")


def test_both_stages_have_the_published_rate_and_teachers_have_their_weight(of_recipe):
    for size, (*_, rate, epochs, teacher) in V2.items():
        config = of_recipe["v2"][size]
        student = plan.student_of(config)
        assert student == (size if teacher == "0.6B" else None)
        for training in [config.distill[student]] if student else [config.stage1, config.stage2]:
            assert (training.learning_rate, training.epochs, training.global_batch_size) == (rate, epochs, 512)
        distilled = config.distill[student] if student else config.stage2
        assert distilled.distillation_weight == (1.0 if teacher else 0.0)
    assert list(of_recipe["v2"]["0.6B"].prune.students) == ["330M", "160M", "80M"]
    for config in of_recipe["v1"].values():
        assert (config.stage1.epochs, config.teacher, config.prune.students) == (0, "none", {})
        assert config.stage2.distillation_weight == config.stage2.matryoshka_min_dim == 0


# Estimates --------------------------------------------------------------------------------------


def test_the_rows_of_whole_mixtures_are_the_papers(of_recipe, registry):
    stage1, stage2, mirror = rows_of(of_recipe["v2"]["4B"], registry)
    assert (stage1, mirror) == (26_693_280, 60_147_938)
    assert stage2 == pytest.approx(18e6, rel=0.01)
    assert rows_of(of_recipe["v1"]["4B"], registry) == (0, 5_933_988, 5_933_988)
    few = resolve_with(of_recipe["v2"]["4B"], only=["squad", "ocgi"])
    assert rows_of(few, registry)[0] == 1_052_849
    local = resolve_with(of_recipe["v2"]["4B"], source="local")
    own = [replace(registry[0], recipes=["local"], rows=None, published_rows=None, files=[])]
    assert rows_of(local, own) == (0, 0, 0) and plan.needs(local, own, H100).hours is None


def resolve_with(config, **data):
    return replace(config, data=replace(config.data, **data))


def test_recomputing_keeps_less(of_recipe):
    for config in of_recipe["v2"].values():
        none, selective, full = (
            costs.activation_bytes(shape_of(config), how)[0] for how in ("none", "selective", "full")
        )
        assert full < selective < none or config.backbone.num_hidden_layers == 1


def test_needs_grow_with_the_size(of_recipe, registry):
    for recipe, names in (("v2", ["nano", "4B", "8B", "14B"]), ("v1", ["nano", "0.6B", "1.7B", "4B"])):
        found = [plan.needs(of_recipe[recipe][name], registry, H100) for name in names]
        for smaller, larger in pairwise(found):
            assert smaller.gpu_gib < larger.gpu_gib
            assert smaller.disk_gib < larger.disk_gib
            assert smaller.hours < larger.hours
    bodies = [
        num_parameters(**shape_of(of_recipe["v2"][name], plan.student_of(of_recipe["v2"][name])))[0] for name in V2
    ]
    assert bodies == sorted(bodies)


@pytest.mark.parametrize(
    ("teacher", "count"),
    [
        ("none", 0),
        ("hub:codefuse-ai/F2LLM-v2-1.7B@" + "7b" * 20, 1_700_000_000),
        ("hub:codefuse-ai/F2LLM-v2-330M@" + "0" * 40, 330_000_000),
        ("folder:models/4B", 4_000_000_000),
        ("experiment:larger", 5),
    ],
)
def test_a_teachers_parameters_are_in_its_name_or_as_many_as_the_students(teacher, count):
    assert costs.teacher_parameters(teacher, own=5) == count


# Does it fit? -----------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch):
    """Sets what the machine has; until then looking is an error."""

    def refuse(config):
        raise AssertionError("the machine was looked at")

    def become(gpus, disk_gib=10_000):
        monkeypatch.setattr(plan, "machine_here", lambda config: Here(gpus, disk_gib))

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(plan, "machine_here", refuse)
    return become


def test_a_size_that_does_not_fit_is_one_message_with_all_that_helps(here, registry):
    here([], disk_gib=123)
    config = load_config("0.6B")
    with pytest.raises(RuntimeError) as error:
        plan.require_fits(config)
    wanted, message = plan.needs(config, registry, [plan.REFERENCE]), str(error.value)
    for part in (
        "cannot train size 0.6B",
        "By estimate it needs",
        f"{wanted.gpu_gib:,.0f} GiB of GPU memory",
        f"{wanted.disk_gib:,.0f} GiB of disk",
        f"{wanted.hours:,.0f} hours of one NVIDIA H100",
        "here: no GPU, 123 GiB of disk",
        "fits here is smollm2",
        "machine.check_needs: false",
        "a larger machine, which `f2llm plan --size 0.6B --gpu NAME` looks for",
    ):
        assert part in message
    assert "\n" not in message


def test_what_needs_less_memory_is_no_other_method(of_recipe, registry):
    for config in of_recipe["v2"].values():
        less = plan.frugal(config)
        assert replace(less, machine=config.machine) == config
        wanted, least = plan.needs(config, registry, H100), plan.needs(less, registry, H100)
        assert least.gpu_gib < wanted.gpu_gib and least.hours >= wanted.hours and least.disk_gib == wanted.disk_gib


def test_a_published_size_that_is_trained_in_the_documents_fits_one_gpu(params, registry):
    found = re.search(
        r"-S model\.size=(\S+) -S machine\.token_budget=(\d+)", (ROOT / "docs" / "experiments.md").read_text()
    )
    params["machine"]["token_budget"] = int(found[2])
    assert plan.fits(resolve(params, found[1]), registry, Here([plan.REFERENCE], 10_000))
    params["machine"]["token_budget"] *= 2
    assert not plan.fits(resolve(params, found[1]), registry, Here([plan.REFERENCE], 10_000)), "nearly filled"


def test_nano_is_let_through_without_a_look_and_so_is_all_where_the_check_is_off(here, params):
    plan.require_fits(load_config("nano"))
    params["machine"]["check_needs"] = False
    plan.require_fits(resolve(params, "14B"))
    with pytest.raises(AssertionError, match="was looked at"):
        plan.require_fits(load_config("14B"))


def test_memory_and_disk_are_enough_or_not(here, registry):
    config = load_config("4B")
    wanted = plan.needs(config, registry, H100)
    enough = [Gpu("NVIDIA H100", wanted.gpu_gib + 1)]
    here(enough, wanted.disk_gib + 1)
    plan.require_fits(config)
    here(enough, wanted.disk_gib - 1)
    with pytest.raises(RuntimeError, match="cannot train size 4B"):
        plan.require_fits(config)
    here([Gpu("NVIDIA H100", wanted.gpu_gib - 1)], wanted.disk_gib + 1)
    with pytest.raises(RuntimeError, match=r"cannot train size 4B.*fits here is 1\.7B"):
        plan.require_fits(config)
    here([*enough, Gpu("NVIDIA L4", 22)], wanted.disk_gib + 1)
    with pytest.raises(RuntimeError, match=r"NVIDIA L4 with 22 GiB.*fits here is smollm2"):
        plan.require_fits(config)


def test_weights_over_several_gpus_are_counted(here, params):
    here(H100 * 8)
    with pytest.raises(RuntimeError, match="cannot train size 8B"):
        plan.require_fits(resolve(params, "8B"))
    params["machine"] |= {"activation_tokens": 4096, "processes": 0}
    with pytest.raises(RuntimeError, match=r"machine\.shard"):
        plan.require_fits(resolve(params, "8B"))
    params["machine"]["shard"] = True
    plan.require_fits(resolve(params, "8B"))
    here(H100)
    params["machine"]["processes"] = 8  # more than there are GPUs
    with pytest.raises(RuntimeError, match="cannot train size 8B"):
        plan.require_fits(resolve(params, "8B"))


def test_the_machine_here_has_what_lies_in_its_folders(config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").touch()
    config = resolve_with(config, mirror="mirror")
    before = plan.machine_here(config)
    (tmp_path / "mirror" / "some").mkdir(parents=True)
    with (tmp_path / "mirror" / "some" / "big").open("wb") as file:
        file.truncate(2**40)  # without blocks on the disk
    after = plan.machine_here(config)
    assert after.gpus == [] and before.disk_gib > 0
    assert after.disk_gib - before.disk_gib == pytest.approx(1024, abs=50)


def test_where_a_driver_is_installed_torch_says_which_gpus_there_are(monkeypatch, tmp_path):
    stand_in = """
from types import SimpleNamespace as record
cuda = record(device_count=lambda: 2)
cuda.get_device_properties = lambda i: record(total_memory=(i + 1) * 2**30, name=f"NVIDIA H{i} 1GB")
"""
    (tmp_path / "torch.py").write_text(stand_in)
    (tmp_path / "nvidia-smi").write_text("")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    gpus_here = hardware.gpus_here.__wrapped__  # without its memory
    assert gpus_here() == (Gpu("NVIDIA H0 1GB", 1), Gpu("NVIDIA H1 1GB", 2))
    (tmp_path / "torch.py").write_text("raise ImportError('no driver')")
    with pytest.raises(
        RuntimeError, match="torch cannot list this machine's GPUs: ImportError: no driver; remedy: a torch that fits"
    ):
        gpus_here()


# Who is stopped ---------------------------------------------------------------------------------


def test_training_notebooks_are_stopped_and_others_are_not(here, monkeypatch, tmp_path, params):
    here([])
    done = []
    monkeypatch.setattr(cli, "load_config", lambda: resolve(params, "0.6B"))
    monkeypatch.setattr(cli, "require_writable", lambda *_, **__: done.append("began"))
    monkeypatch.setattr(cli, "execute", lambda *_: done.append("ran"))
    monkeypatch.setattr("f2llm.store.checkpoint.clear_finished", lambda _: None)
    stopped, notebooks = [], [path.stem for path in STAGE_NOTEBOOKS]
    for notebook in notebooks:
        try:
            cli.run(notebook)
        except RuntimeError as error:
            assert "cannot train size 0.6B" in str(error)
            stopped.append(notebook)
    assert stopped == ["01_data", "02_backbone", "04_stage1", "05_stage2", "07_distill"]
    assert done == ["began", "ran"] * (len(notebooks) - 5) != [], "a notebook that was stopped has not begun"
    with pytest.raises(RuntimeError, match="cannot train"):
        cli.teacher(tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()


def test_the_table_marks_the_chosen_size_and_what_cannot_be_trained_here(here, capsys):
    here([Gpu("NVIDIA H100", 70)])
    cli.sizes()
    lines = capsys.readouterr().out.splitlines()
    rows = {tuple(line.split()[:2]): line for line in lines if line.startswith(("v1 ", "v2 "))}
    assert len(rows) == 14 + 6, "the papers' sizes and those of other families"
    assert [key for key, line in rows.items() if line.endswith("<- model.size")] == [("v2", "nano")]
    fit = {key for key, line in rows.items() if "not here" not in line}
    small = {("v2", name) for name in ("nano", "smollm2", "0.6B", "330M", "160M", "80M")}
    small |= {("v2", name) for name in ("SmolLM2-360M", "Qwen2.5-0.5B")}
    assert fit == small | {("v1", "nano"), ("v1", "0.6B")}
    assert "596.0M" in rows["v2", "0.6B"] and "440.5M" in rows["v2", "0.6B"] and " 80.1M" in rows["v2", "80M"]
    assert "by estimate" in lines[-2] and "NVIDIA H100 with 70 GiB" in lines[-1]


# Adapters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", ["all", ["q_proj", "down_proj"]])
def test_an_adapters_parameters_are_those_that_peft_makes(targets, dora):
    from transformers import AutoModel, Qwen3Config

    from f2llm.config import Lora
    from f2llm.lora import add_adapter, num_trained

    shape = costs.shape_of(load_config("nano")) | {"num_hidden_layers": 3}
    architecture = shape.pop("architecture")
    model, lora = AutoModel.from_config(Qwen3Config(**shape)), Lora(rank=5, alpha=8.0, dora=dora, targets=targets)
    add_adapter(model, lora, seed=0)
    assert num_trained(model)[0] == costs.adapter_parameters(shape | {"architecture": architecture}, lora) > 1000


def test_an_adapter_leaves_gradients_and_optimizer_state_to_itself_alone(registry):
    def memory(rank):
        config = load_config("0.6B", training={"lora": {"rank": rank}}, machine={"token_budget": 4096})
        config = replace(config, machine=replace(config.machine, precision="float16", activation_tokens=4096))
        work = costs.trainings(config, registry)[0]
        return costs.memory(work, config.machine, Gpu("Tesla T4", 16)), costs.flops(work, config.machine)

    (full, full_flops), (adapted, adapted_flops) = memory(0), memory(16)
    assert full["optimizer"] == 2 * full["gradients"] == 2 * full["weights"]
    assert adapted["optimizer"] < 0.05 * full["optimizer"] and adapted["weights"] > full["weights"]
    assert sum(adapted.values()) < 16 * hardware.GIB
    ratio = adapted_flops["forward and backward"] / full_flops["forward and backward"]
    assert ratio == pytest.approx(2 / 3)
