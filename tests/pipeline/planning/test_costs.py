"""What a plan counts is what torch counts: operations, saved activations, bytes of weights and optimizer."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

from f2llm.batches import HomogeneousBatches
from f2llm.config import TRAINING_STAGES, HardNegatives, read_yaml, resolve
from f2llm.optimizer import build_optimizer
from f2llm.packing import make_pack
from f2llm.pipeline.planning import costs, counted, measure, plan, steps, table
from f2llm.pipeline.planning.costs import Work
from f2llm.pipeline.planning.measure import Order, Took
from f2llm.pipeline.planning.plan import Here, Measured
from f2llm.pipeline.planning.table import Asked
from f2llm.store.hardware import GIB, SHEETS, Gpu, gpu_named, preset_for

SHAPE = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "architecture": "qwen3"}
LENGTHS = ([5, 9, 9], [30, 17, 21, 40, 40, 8])


@pytest.fixture
def work(tiny_training):
    training = replace(tiny_training, global_batch_size=3, hard_negatives=HardNegatives(1, 1, 1), max_tokens=64)
    return Work("stage1", SHAPE, training, 100, [LENGTHS, LENGTHS])


@pytest.fixture
def machine(config):
    return replace(config.machine, threads=1, token_budget=64, activation_tokens=1000)


def model_and_pack(work, machine):
    embedder = steps._model(Order(work, machine))
    embedder.model.train()
    lengths = sorted([*work.lengths[0][0], *work.lengths[0][1]])
    return embedder, make_pack(list(range(len(lengths))), [list(range(length)) for length in lengths])


# Operations -------------------------------------------------------------------------------------


def attention_flops(shape, lengths):
    """Of the causal half, by hand: scores and sums of values, each 2 operations for a pair of tokens and a number."""
    heads = shape["num_attention_heads"] * shape["head_dim"]
    layers = (shape["num_hidden_layers"] - 1) * sum(4 * heads * length**2 / 2 for length in lengths)
    return layers + sum(4 * heads * length for length in lengths)  # the last layer: one query for each text


@pytest.mark.parametrize("layers", [1, 3])
def test_operations_are_those_that_torch_counts(work, machine, layers):
    work = measure.with_layers(work, layers)
    embedder, pack = model_and_pack(work, machine)
    with FlopCounterMode(display=False) as forward:
        output = embedder.embed_pack(pack)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    lengths = [*LENGTHS[0], *LENGTHS[1]]
    products = costs.forward_flops(work.shape, lengths) - attention_flops(work.shape, lengths)
    assert forward.get_total_flops() == pytest.approx(products), "torch does not know our operator of attention"
    assert backward.get_total_flops() == pytest.approx(2 * products, rel=0.02) and products > 1e6


def test_a_model_of_another_family_computes_its_last_layer_for_all_tokens(work):
    lengths = LENGTHS[1]
    whole = costs.forward_flops(SHAPE | {"architecture": "olmo"}, lengths)
    deeper = costs.forward_flops(SHAPE | {"architecture": "olmo", "num_hidden_layers": 4}, lengths)
    assert deeper == pytest.approx(whole * 4 / 3) and whole > costs.forward_flops(SHAPE, lengths)


def test_what_is_computed_again_is_what_is_not_kept(work, machine):
    forward = costs.flops(work, machine)["forward and backward"] / 3
    assert costs.flops(work, machine)["second forward"] == costs.flops(work, machine)["recomputing"] == 0
    little = replace(machine, activation_tokens=64, recompute="full")
    assert costs.flops(work, little)["second forward"] == pytest.approx(forward * (1 - 64 / 179))
    assert costs.flops(work, little)["recomputing"] == forward
    assert costs.flops(work, little, processes=2)["second forward"] == pytest.approx(forward * (1 - 64 / 89.5))


def test_a_teacher_that_is_stored_embeds_each_text_once(work, machine):
    taught = replace(work, teacher=(1000, 700), num_different=90)
    assert costs.flops(taught, machine)["teacher"] == pytest.approx(2 * 700 * 179 * 90 / 900)
    live = costs.flops(taught, replace(machine, teacher_cache_gib=0.0))
    assert live["teacher"] == pytest.approx(2 * 700 * 179)
    shaped = costs.flops(replace(taught, teacher_shape=SHAPE), machine)
    assert shaped["teacher"] == pytest.approx(shaped["forward and backward"] / 3 * 90 / 900)


# Memory -----------------------------------------------------------------------------------------


def saved_bytes(work, machine, dtype=None):
    """(bytes that autograd keeps of a pack, without weights; bytes of casts of weights; tokens; texts)"""
    embedder, pack = model_and_pack(work, machine)
    embedder.autocast_dtype = dtype
    places = {parameter.data_ptr() for parameter in embedder.model.parameters()}
    shapes = {tuple(parameter.shape) for parameter in embedder.model.parameters() if parameter.ndim > 1}
    kept, casts = {}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        is_cast = {tuple(tensor.shape), tuple(tensor.shape[::-1])} & shapes
        if storage.data_ptr() not in places:
            (casts if is_cast else kept)[storage.data_ptr()] = (storage, tensor)  # held, or its place is given away
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = embedder.embed_pack(pack)
    sums = [sum(storage.nbytes() for storage, _ in found.values()) for found in (kept, casts)]
    return *sums, pack.num_tokens, len(output)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layers", [1, 3])
def test_activations_are_what_autograd_saves(work, machine, layers, dtype):
    work = measure.with_layers(work, layers)
    kept, _, tokens, texts = saved_bytes(work, machine, dtype)
    a_token, a_text = costs.activation_bytes(work.shape, "none", half=dtype is not None)
    assert kept == pytest.approx(a_token * tokens + a_text * texts, rel=0.08)


def test_in_half_precision_every_pack_keeps_a_copy_of_the_matrices(work, machine):
    kept = replace(machine, precision="bfloat16")
    _, casts, *_ = saved_bytes(work, machine, torch.bfloat16)
    packs = -(-179 // 64)
    assert costs.memory(work, kept, None)["copies of weights"] == pytest.approx(casts * packs, rel=0.02)
    assert casts > 1e5 and costs.memory(work, machine, None)["copies of weights"] == 0


def test_weights_gradients_and_optimizer_are_those_of_a_step(work, machine):
    embedder, pack = model_and_pack(work, machine)
    optimizer = build_optimizer(embedder.model, work.training)
    embedder.embed_pack(pack).sum().backward()
    optimizer.step()
    parameters = list(embedder.model.parameters())
    counted_bytes = costs.memory(work, machine, None)
    assert sum(parameter.nbytes for parameter in parameters) == counted_bytes["weights"]
    assert sum(parameter.grad.nbytes for parameter in parameters) == counted_bytes["gradients"]
    states = [state for of in optimizer.state.values() for state in of.values() if state.ndim]
    assert sum(state.nbytes for state in states) == counted_bytes["optimizer"] > 0


def test_shards_divide_what_training_keeps_of_the_weights(work, machine):
    alone = costs.memory(work, replace(machine, shard=True), gpu_named("H100"))
    four = costs.memory(work, replace(machine, shard=True), gpu_named("H100"), processes=4)
    for name in ("weights", "gradients", "optimizer"):
        assert four[name] == alone[name] / 4 > 0


def test_the_peak_is_all_but_what_is_never_there_at_once(work, machine):
    for changes in ({}, {"activation_tokens": 64}, {"token_budget": 1000}):
        parts = costs.memory(work, replace(machine, **changes), None)
        others = sum(parts.values()) - parts["gradients"] - parts["activations"] - parts["not at once"]
        peak = sum(parts.values()) - others
        assert max(parts["gradients"], parts["activations"]) <= peak <= parts["gradients"] + parts["activations"]


def test_memory_is_that_of_the_largest_step(work, machine):
    small = replace(work, lengths=[([5] * 3, [8] * 6)])
    both = replace(work, lengths=[*small.lengths, LENGTHS])
    assert costs.memory(both, machine, None) == costs.memory(work, machine, None)
    assert costs.memory(small, machine, None)["activations"] < costs.memory(work, machine, None)["activations"] / 2


def test_a_gpu_that_no_preset_suits_is_planned_all_the_same(config, registry, monkeypatch):
    lines = lines_of(config, registry, monkeypatch)
    assert not any("preset" in line for line in lines)
    monkeypatch.setattr(plan, "machine_here", lambda config: Here([Gpu("Some GPU", 8)], 1000, 16))
    monkeypatch.setattr(table, "_measured", lambda *_: None)
    lines = table.planned(config, registry, Asked())
    assert not any("preset" in line for line in lines) and lines[-1].startswith("fits: ")


def test_a_measured_adapter_is_all_that_is_trained(work, machine):
    adapted = replace(work, training=replace(work.training, lora=replace(work.training.lora, rank=4)))
    embedder = steps._model(Order(adapted, machine))
    trained = sum(parameter.numel() for parameter in embedder.model.parameters() if parameter.requires_grad)
    assert trained == costs.trained_parameters(adapted) < costs.trained_parameters(work)


def test_one_h200_held_the_memory_that_is_counted(config):
    """benchmarks/results/gpu.json: 91.1 GiB at 32 queries, 57,000 tokens, of which 32,768 were kept."""
    shape = resolve(read_yaml(ROOT / "params.yaml"), "0.6B")
    lengths = ([38] * 32, [218] * 256)
    work = Work("stage1", costs.shape_of(shape), shape.stage1, 1, [lengths])
    machine = replace(shape.machine, token_budget=32768, activation_tokens=32768)
    assert sum(costs.memory(work, machine, gpu_named("H200")).values()) / GIB == pytest.approx(91.1, rel=0.1)


# Does it fit, and with what? --------------------------------------------------------------------


@pytest.mark.parametrize("size", ["0.6B", "1.7B", "8B"])
@pytest.mark.parametrize("gpu", ["T4", "L4", "A100", "H200"])
def test_settings_that_are_named_fit_and_change_only_the_machine(params, registry, size, gpu):
    config, here = resolve(params, size), Here([gpu_named(gpu)] * 8, float("inf"))
    works = costs.trainings(config, registry)
    changes = plan.settings_that_fit(works, config.machine, here)
    if changes is None:
        least = replace(config.machine, recompute="full", activation_tokens=1024, shard=True, processes=0)
        assert max(plan.cost(work, least, here).peak_gib for work in works) > plan.room(here)
        return
    changed = resolve(params, size, {"machine": changes})
    assert max(plan.cost(work, changed.machine, here).peak_gib for work in works) <= SHEETS[gpu].gib
    assert replace(changed, machine=config.machine) == config
    assert f"'++override.machine.{next(iter(changes))}=" in plan.command(config, changes)


def lines_of(config, registry, monkeypatch, **asked):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(plan, "machine_here", lambda config: Here([], 1000, 16))
    monkeypatch.setattr(table, "_measured", lambda *_: None)
    return table.planned(config, registry, Asked(**asked))


def test_the_table_has_a_figure_and_its_origin_in_every_row(params, registry, monkeypatch):
    config = resolve(params, "0.6B")
    lines = lines_of(config, registry, monkeypatch, gpu="H100", gpus=8, nodes=2, price=2.5)
    rows = {line[:30].strip(): line for line in lines}
    assert "104,272" in rows["steps"] and "750,080" in rows["tokens a step"]
    assert any("GPU hours" in line and "at 2.5 per GPU hour" in line for line in lines)
    table = lines[3 : lines.index("", 3)]
    assert len(table) > 14 and all(line.rstrip()[-1].isalpha() for line in table)
    assert "not yet held against a GPU" in rows["seconds a step"] and lines[-1].startswith("fits: ")


def test_without_a_gpu_time_is_unknown_until_it_is_measured(config, registry, monkeypatch):
    lines = lines_of(config, registry, monkeypatch, stage="stage1", gpu="none")
    assert any(line.startswith("seconds a step") and "unknown" in line and "--measure" in line for line in lines)
    assert "distill" not in lines[2] and "stage1" in lines[2]


def test_what_fits_nowhere_is_said_with_what_would_do(params, registry, monkeypatch):
    lines = lines_of(resolve(params, "8B"), registry, monkeypatch, gpu="A100")
    assert lines[-3].startswith("does not fit") and "machine.preset=80GB" in lines[-4]
    assert "would fit on" in lines[-1] and "++override.machine.shard=true" in lines[-1]
    lines = lines_of(resolve(params, "0.6B"), registry, monkeypatch, gpu="T4")
    (adapter,) = (line for line in lines if line.startswith("an adapter"))
    assert "'++override.training.lora.rank=16'" in adapter and "'++override.machine.precision=float16'" in adapter
    assert any("fast in float16 only" in line and "++override.machine.precision=float16" in line for line in lines)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"gpu": "H10"}, "--gpu is 'H10', but must be one of: T4, L4, .*H200, none; did you mean 'H100'"),
        ({"stage": "mine"}, "the stage is 'mine', but must be one of: all, stage1, stage2, distill"),
        ({"gpu": "T4", "gpus": 0}, "--gpus is 0, but must be 1 or more"),
        ({"gpu": "T4", "price": -1.0}, "--price is -1.0, but must be 0 or more"),
        ({"gpus": 8}, "--gpus and --nodes are of a machine that --gpu names"),
        ({"gpu": "T4", "measure": True}, "--measure runs steps on this machine, not on --gpu T4"),
    ],
)
def test_a_machine_that_there_is_not_is_one_error(config, registry, monkeypatch, asked, message):
    with pytest.raises(ValueError, match=message):
        lines_of(config, registry, monkeypatch, **asked)


# Presets of `machine` ---------------------------------------------------------------------------


def test_every_preset_is_a_machine_of_the_same_method(params):
    plain = resolve(params, "0.6B")
    for name, preset in params["machines"].items():
        config = resolve(params, "0.6B", {"machine": {"preset": name}})
        assert config.machine == replace(plain.machine, preset=name, **preset["machine"])
        assert replace(config, machine=plain.machine) == plain
    assert resolve(params, "0.6B", {"machine": {"preset": "T4"}}).machine.precision == "float16"


def test_a_preset_stands_under_what_a_size_and_an_override_say(params):
    params["machine"]["preset"] = "24GB"
    assert params["sizes"]["smollm2"]["machine"]["token_budget"] == 4096
    machine = resolve(params, "smollm2", {"machine": {"activation_tokens": 5000}}).machine
    assert (machine.token_budget, machine.activation_tokens, machine.recompute) == (4096, 5000, "full")


@pytest.mark.parametrize(
    ("gpus", "name"),
    [
        ([], "cpu"),
        ([Gpu("Tesla T4", 14.6)], "T4"),
        ([Gpu("Tesla T4", 14.6)] * 8, "T4"),
        ([Gpu("NVIDIA RTX A4000", 15.7)], "16GB"),
        ([Gpu("NVIDIA L4", 22.0)], "24GB"),
        ([Gpu("NVIDIA A100-SXM4-80GB", 79.1)] * 2, "80GB"),
        ([Gpu("NVIDIA H200", 139.8)] * 8, "8x80GB"),
        ([Gpu("NVIDIA H200", 139.8)] * 7 + [Gpu("NVIDIA L4", 22.0)], "24GB"),
    ],
)
def test_auto_takes_the_preset_for_the_gpus_that_are_here(params, monkeypatch, gpus, name):
    assert preset_for(tuple(gpus), params["machines"]) == name
    monkeypatch.setattr("f2llm.store.params.gpus_here", lambda: tuple(gpus))
    assert resolve(params, "0.6B", {"machine": {"preset": "auto"}}).machine.preset == name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"preset": "T5"}, "machine.preset is 'T5', but params.yaml offers only: cpu, T4, 16GB"),
        ({"preset": "8x80GB", "processes": 1}, "preset is '8x80GB' and shard is true, but processes is 1.*remedy"),
        ({"preset": "auto"}, "machine.preset is auto, but none of .* suits Some GPU with 8 GiB; remedy"),
    ],
)
def test_a_preset_that_is_none_or_contradicts_is_one_error(params, monkeypatch, override, message):
    monkeypatch.setattr("f2llm.store.params.gpus_here", lambda: (Gpu("Some GPU", 8),))
    with pytest.raises(ValueError, match=message):
        resolve(params, "0.6B", {"machine": override})


def test_no_stage_but_the_first_depends_on_the_machine():
    stages = read_yaml(ROOT / "dvc.yaml")["stages"]
    named = [name for name, stage in stages.items() if "machine" in repr(stage.get("params", ""))]
    assert named == ["config"] and set(TRAINING_STAGES) <= stages.keys()


# Measured ---------------------------------------------------------------------------------------


def test_what_takes_equal_times_for_layers_and_texts_is_scaled_exactly(work, machine):
    """A machine of 1e9 operations a second, and an optimizer of 1e-9 seconds a parameter."""
    deep = measure.with_layers(replace(work, lengths=[([9] * 40, [30] * 80)]), 12)
    deep = replace(deep, training=replace(deep.training, global_batch_size=40))
    reduced = measure.fewer_queries(deep, machine, most=5e6)
    assert 2 <= len(reduced.lengths[0][0]) < 40

    def took(layers):
        some = measure.with_layers(reduced, layers)
        seconds, count = sum(costs.flops(some, machine).values()) / 1e9, costs.num_parameters(**some.shape)[0]
        return Took(seconds, seconds, count / 1e9, costs.forward_flops_of(some) / 1e9, 10**9 * layers)

    found = measure.scaled({layers: took(layers) for layers in measure.DEPTHS}, reduced, deep, machine, Here([], 0, 16))
    expected = sum(costs.flops(deep, machine).values()) / 1e9 + costs.num_parameters(**deep.shape)[0] / 1e9
    assert found.seconds == pytest.approx(expected, rel=0.01)
    assert found.seconds_per_flop == pytest.approx(1e-9)
    assert found.how.startswith("measured at 2 and 3 of 12 layers, ") and "of 40 queries" in found.how
    assert found.peak_gib is None, "fewer activations were kept than a whole step keeps"


def test_a_measured_step_is_remembered_for_the_same_training_and_settings(work, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    small = replace(config, machine=replace(config.machine, threads=1, token_budget=64))
    assert measure.remembered(work, small.machine) is None
    found = measure.measure(work, small, Here([], 0, 16))
    assert 0 < found.seconds < 60 and found.seconds_per_flop > 0 and found.how == "measured"
    assert found.peak_gib is None or 0 < found.peak_gib < 1
    assert measure.remembered(work, small.machine) == found
    assert measure.remembered(work, replace(small.machine, token_budget=128)) is None
    planned = plan.cost(work, small.machine, Here([], 0, 16), found)
    assert planned.hours == pytest.approx(found.seconds * 100 / 3600)


def test_a_small_students_teacher_takes_its_own_time(work, machine):
    student = SHAPE | {"hidden_size": 8, "num_hidden_layers": 1}
    taught = replace(work, shape=student, teacher=costs.num_parameters(**SHAPE), teacher_shape=SHAPE)
    took = Took(seconds=3.0, cpu_seconds=3.0, optimizer=1.0, encoding=2.0, peak=None, teaching=5.0)
    found = measure.scaled({1: took}, taught, taught, replace(machine, teacher_cache_gib=0.0), Here([], 0, 16))
    assert found.seconds == pytest.approx(3 + 1 + 5)
    order = Order(taught, machine)
    assert steps._teacher(order).dim == 64 and steps._model(order).dim == 8


def test_what_does_not_fit_here_is_not_measured(work, machine):
    with pytest.raises(RuntimeError, match=r"stage1 needs .* GiB .* but here are 0\.0; remedy"):
        measure.run(Order(work, machine), Here([], 0, 0.001))


def test_token_budgets_double_until_two_bring_nothing(work, config, monkeypatch):
    work = replace(work, lengths=[([9] * 400, [30] * 800)], training=replace(work.training, global_batch_size=400))
    speed = {256: 1.0, 512: 2.0, 1024: 2.01, 2048: 2.0, 4096: 9.0}

    def took(order, here):
        seconds = order.work.tokens() / speed[order.machine.token_budget]
        return Took(seconds, seconds, 0.1, 0.1, None)

    monkeypatch.setattr(measure, "run", took)
    found = dict(measure.rates(work, config, Here([], 0, 16)))
    assert found == pytest.approx({256: 1.0, 512: 2.0, 1024: 2.01, 2048: 2.0})


def test_texts_of_steps_are_counted_in_the_data(small_store, tiny_training, config, tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(counted, "BACKBONE", tmp_path)
    work = Work("stage2", SHAPE, tiny_training, None, [LENGTHS])
    found = counted.count(work, config, small_store)
    batches = HomogeneousBatches(small_store, tiny_training, config.seed, stage1=False)
    assert found.counted and found.steps == len(batches) and len(found.lengths) == min(counted.SAMPLE, len(batches))
    for step, (queries, documents) in zip(counted.sampled(len(batches)), found.lengths, strict=True):
        texts = batches[step].texts
        tokens = [len(ids) for ids in tokenizer(texts)["input_ids"]]
        assert Counter(min(number, tiny_training.max_tokens) for number in tokens) == Counter([*queries, *documents])
        assert len(queries) == len(set(batches[step].query))


def test_random_batches_have_the_lengths_of_the_plan(work):
    batches, tokens = steps._random(work)
    assert len(batches) == 1 + len(work.lengths) and batches[0] is batches[1]
    for batch in batches:
        assert [len(tokens[batch.source][row]) for row in batch.stored] == [*LENGTHS[0], *LENGTHS[1]]
        assert batch.hard_negatives.shape == (3, 1) and not set(batch.query) & set(batch.passage)
        assert np.unique([*batch.passage, *batch.hard_negatives.ravel()]).tolist() == list(range(3, 9))


def test_texts_of_a_task_are_found_in_any_form():
    data = {"default": {"queries": ["a"], "corpus": ["b", "c"], "relevant": [[0, 1]], "score": [0.5]}}
    assert counted.texts_in(data) == ["a", "b", "c"]


def test_a_measurement_takes_the_place_of_what_is_counted(work, machine):
    found = plan.cost(work, machine, Here([], 0, 16), Measured(2.0, 1e-9, 3.0, "measured"))
    assert (found.seconds, found.peak_gib) == (2.0, 3.0)
