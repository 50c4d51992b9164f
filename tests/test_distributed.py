"""Two processes over gloo = one process: losses, gradients, weights, a teacher's rows; replicated and sharded."""

import copy
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_small_store
from helpers import ranks
from helpers.closeness import assert_all_close, assert_close
from safetensors.torch import load_file

from f2llm import distributed
from f2llm.batches import HomogeneousBatches
from f2llm.contract import read_contract
from f2llm.model import Embedder
from f2llm.optimizer import build_optimizer
from f2llm.step import compute_losses
from f2llm.store.checkpoint import latest, read_state, read_tensors
from f2llm.store.tuples import TupleStore


@pytest.fixture(scope="module")
def folder(_session_model, tokenizer, tmp_path_factory):
    """A model, a teacher with other weights, and a store."""
    folder = tmp_path_factory.mktemp("ranks")
    for seed, name in enumerate(("model", "teacher")):
        model = copy.deepcopy(_session_model)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        Embedder(model, tokenizer, max_tokens=24).save(folder / name)
    write_small_store(folder / "store")
    return folder


@pytest.fixture(scope="module")
def gradients(folder):
    """gradients(name) -> (losses, {parameter: gradient}) of one process under that setting, computed once."""
    training, machine = ranks.plans(ROOT / "params.yaml")
    return cache(lambda name: ranks.gradients(folder, training, machine, ranks.SETTINGS[name]))


@pytest.fixture(scope="module")
def of_two(folder, tmp_path_factory):
    """Where two processes left their results."""
    out = tmp_path_factory.mktemp("two")
    run_ranks(2, folder, out, "all")
    return out


def run_ranks(processes, folder, out, what):
    """Run tests/helpers/ranks.py in several processes; their output is left in said.txt."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    arguments = [str(Path(ranks.__file__)), str(folder), str(out), str(ROOT / "params.yaml"), what]
    path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], env={**os.environ, **path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[:6000]
    (out / "said.txt").write_text(done.stdout)


def assert_same_losses(found, expected, training):
    """On the scale of the similarities that they are differences of: with a single passage the true loss is 0."""
    assert found.keys() == expected.keys() and max(expected.values()) > 0.1, "vacuous: no loss"
    for name, loss in expected.items():
        assert_close(found[name], loss, scale=max(loss, 1 / training.temperature), name=name)


@pytest.mark.parametrize("name", ranks.SETTINGS)
def test_losses_and_gradients_of_two_processes_are_those_of_one(gradients, of_two, name):
    training, _ = ranks.plans(ROOT / "params.yaml")
    losses, expected = gradients(name)
    theirs = load_file(of_two / f"{name}.safetensors")
    assert_same_losses({key: theirs.pop(f"loss.{key}").item() for key in losses}, losses, training)
    assert max(grad.abs().max() for grad in expected.values()) > 0.01, "vacuous: no gradient"
    assert_all_close(theirs, expected, eps=1e-4)


def plain_gradients(folder, training):
    """Oracle: every text embedded at once, one loss, one backward."""
    model, teacher = (Embedder.load(folder / name, training=True) for name in ("model", "teacher"))
    model.max_tokens = teacher.max_tokens = training.max_tokens
    batches = HomogeneousBatches(TupleStore(folder / "store", mined=None), training, seed=0, stage1=False)
    batch = next(batches[step] for step in range(batches.per_epoch) if batches[step].source == "pairs")
    token_ids = model.tokenize(batch.texts)
    target = teacher.embed(token_ids).detach() if training.distillation_weight else None
    losses = compute_losses(model.embed(token_ids), batch, training, target)
    sum(losses.values()).backward()
    return {key: loss.item() for key, loss in losses.items()}, {n: p.grad for n, p in model.model.named_parameters()}


@pytest.mark.parametrize("name", ranks.SETTINGS)
def test_gradient_caching_equals_the_plain_step(folder, gradients, name):
    training, _ = ranks.plans(ROOT / "params.yaml")
    losses, cached = gradients(name)
    of_method = {key: value for key, value in ranks.SETTINGS[name].items() if hasattr(training, key)}
    expected_losses, expected = plain_gradients(folder, replace(training, **of_method))
    assert_same_losses(losses, expected_losses, training)
    assert_all_close(cached, expected, eps=1e-4)


def test_the_gradient_of_queries_only_is_another_one(gradients):
    training, _ = ranks.plans(ROOT / "params.yaml")
    full, query_only = gradients("plain"), gradients("query_only")
    assert_same_losses(query_only[0], full[0], training)
    assert (full[1]["norm.weight"] - query_only[1]["norm.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ranks.TRAININGS)
def test_weights_trained_by_two_processes_are_those_of_one(folder, of_two, tmp_path, name):
    training, machine = ranks.plans(ROOT / "params.yaml")
    _, distilled = ranks.TRAININGS[name]
    expected, validation = ranks.trained(folder, training, machine, tmp_path, distilled)
    before = Embedder.load(folder / "model").model.state_dict()
    theirs = load_file(of_two / f"{name}.safetensors")
    of_one, of_both = (
        torch.cat([(after[key] - before[key]).flatten() for key in expected]) for after in (expected, theirs)
    )
    assert of_one.abs().max() > 1e-4, "vacuous: nothing was learned"
    # As a whole: where a gradient is almost 0, rounding decides the direction of AdamW's step.
    assert (of_both - of_one).norm() < 0.02 * of_one.norm()
    assert (of_two / name / "step-00000003" / "manifest.json").exists()
    lines = (of_two / name / "validation.csv").read_text().splitlines()
    assert len(lines) == 1 + len(validation) > 10


def test_the_teacher_matters_to_what_two_processes_train(of_two):
    alone, distilled = (load_file(of_two / f"{name}.safetensors") for name in ("trained", "trained_distilled"))
    assert max((alone[key] - distilled[key]).abs().max() for key in alone) > 1e-4


@pytest.mark.parametrize("name", ranks.TRAININGS)
def test_two_processes_go_on_from_their_checkpoint_to_the_same_weights(of_two, name):
    whole, resumed = (load_file(of_two / f"{name}{suffix}.safetensors") for suffix in ("", "_resumed"))
    assert whole.keys() == resumed.keys() and len(whole) > 10
    assert all(torch.equal(weight, resumed[key]) for key, weight in whole.items())
    rows = (of_two / name / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "1", "2", "3"]


def read_here(folder, path, training):
    """One process's model and optimizer, filled from a checkpoint."""
    model = Embedder.load(folder / "model", training=True)
    optimizer = build_optimizer(model.model, training)
    weights, optimizer_state = distributed.state_dicts(model.model, optimizer)
    read_tensors(path, weights | optimizer_state)
    distributed.load_state_dicts(model.model, optimizer, weights, optimizer_state)
    return model, optimizer


def test_what_two_processes_saved_goes_on_in_one(folder, of_two):
    training, _ = ranks.plans(ROOT / "params.yaml")
    states = {}
    for name in ("trained", "trained_sharded"):
        path = latest(of_two / name)
        model, optimizer = read_here(folder, path, training)
        assert read_state(path)["step"] == 3
        assert {value["step"].item() for value in optimizer.state.values()} == {3}
        whole = load_file(of_two / f"{name}.safetensors")
        assert all(torch.equal(weight, whole[key]) for key, weight in model.model.state_dict().items())
        states[name] = {number: value["exp_avg"] for number, value in enumerate(optimizer.state.values())}
    assert max(average.abs().max() for average in states["trained"].values()) > 1e-4, "vacuous: no optimizer_state"
    assert_all_close(states["trained_sharded"], states["trained"], eps=1e-3)


# Shards -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_four(folder, of_two, tmp_path_factory):
    """Four processes: a sharded training of their own, killed and resumed, and what other numbers began, brought to its
    end."""
    out = tmp_path_factory.mktemp("four")
    for name, begun in (("of_two", of_two / "trained_sharded"), ("of_one", of_two / "trained")):
        shutil.copytree(begun, out / name)
        shutil.rmtree(out / name / "step-00000003")
        seal_under(out / name, begun.name)
    run_ranks(4, folder, out, "shards")
    return out


def seal_under(folder, former):
    """The checkpoints of a folder that was copied: their manifests name the training by its folder."""
    for manifest in folder.glob("step-*/manifest.json"):
        manifest.write_text(manifest.read_text().replace(f'"{former}"', f'"{folder.name}"'))


def tensors_of(path):
    """{file: {name: shape}} of a checkpoint."""
    return {
        file.name: {name: tuple(tensor.shape) for name, tensor in load_file(file).items()}
        for file in sorted(path.glob("*.safetensors"))
    }


@pytest.mark.parametrize("processes", [2, 4])
def test_every_process_writes_its_own_part(of_two, of_four, processes):
    shards = tensors_of((of_two / "trained_sharded" if processes == 2 else of_four / "own") / "step-00000003")
    assert len(shards) == processes
    whole = {name: weight.numel() for name, weight in load_file(of_two / "trained.safetensors").items()}
    for kind in ("", ".exp_avg", ".exp_avg_sq"):
        parts = {name: [part[name + kind] for part in shards.values() if name + kind in part] for name in whole}
        assert {name: sum(map(np.prod, found)) for name, found in parts.items()} == whole
    sizes = [file.stat().st_size for file in (of_four / "own" / "step-00000003").glob("*.safetensors")]
    assert max(sizes) < 2 * min(sizes), "vacuous: one process wrote all"


def test_four_processes_go_on_from_their_shards_to_the_same_weights(of_four):
    whole, resumed = (load_file(of_four / f"{name}.safetensors") for name in ("own", "own_resumed"))
    assert whole.keys() == resumed.keys() and len(whole) > 10
    assert all(torch.equal(weight, resumed[key]) for key, weight in whole.items())


@pytest.mark.parametrize(("name", "begun"), [("of_two", "trained_sharded"), ("of_one", "trained")])
def test_four_processes_go_on_from_what_other_numbers_began(folder, of_two, of_four, name, begun):
    """Sharded by two, and whole: both come to the weights of those who began, but for the rounding of sums."""
    before = Embedder.load(folder / "model").model.state_dict()
    expected, found = load_file(of_two / f"{begun}.safetensors"), load_file(of_four / f"{name}.safetensors")
    learned, difference = (
        torch.cat([(one[key] - other[key]).flatten() for key in before])
        for one, other in ((expected, before), (found, expected))
    )
    assert difference.norm() < 0.02 * learned.norm() and learned.abs().max() > 1e-4
    assert [row.split(",")[0] for row in (of_four / name / "log.csv").read_text().splitlines()] == [
        "step", "1", "2", "3",
    ]  # fmt: skip


def test_a_damaged_shard_is_found_by_whoever_reads_it(of_four):
    """Process 3's file of the newest checkpoint lost a bit: all processes went on from the one before."""
    said = (of_four / "said.txt").read_text()
    assert re.search(r"damaged/step-00000003 is not a whole checkpoint .*: the content of shard-00004-\S+ is not", said)
    assert "resumes after step 2 of 3" in said
    whole, again = (load_file(of_four / f"{name}.safetensors") for name in ("own", "damaged"))
    assert all(torch.equal(weight, again[key]) for key, weight in whole.items())


def test_one_process_that_cannot_write_ends_the_training_and_keeps_the_last_checkpoint(of_four):
    errors = sorted(of_four.glob("error_*.txt"))
    assert len(errors) == 4
    for error in errors:
        assert re.fullmatch(
            r"RuntimeError: process 2 cannot write its part of \S+/step-00000003: .*No space left on device.*; "
            r"the checkpoint before it is kept\. remedy: .*",
            error.read_text(),
        )
    assert [path.name for path in sorted((of_four / "full").glob("*step-*"))] == ["step-00000002"]


def test_a_model_written_by_two_processes_has_a_contract_and_embeddings_if_each_has_all_weights(of_two):
    """Process 0 computes them alone: nobody may wait for another."""
    for name, (sharded, _) in ranks.TRAININGS.items():
        contract = read_contract(of_two / name / "model")
        model = Embedder.load(of_two / name / "model")
        weights = load_file(of_two / f"{name}_resumed.safetensors")
        assert all(torch.equal(tensor, weights[key]) for key, tensor in model.model.state_dict().items())
        for probe in contract.probes:
            assert probe.has_ids(*model.tokenize([probe.whole_text]))
            assert (probe.embedding is None) == sharded == (contract.computed_in is None)
            if not sharded:
                assert_close(probe.embedding, model.encode([probe.whole_text])[0][: len(probe.embedding)])


# A teacher's embeddings -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_one(folder, tmp_path_factory):
    """(rows, texts that the teacher embedded, folder of the cache) of one process."""
    training, machine = ranks.plans(ROOT / "params.yaml")
    out = tmp_path_factory.mktemp("one") / "cache"
    return *ranks.targets(folder, training, machine, out), out


def test_a_teachers_rows_of_two_processes_are_those_of_one_in_both_and_each_text_is_embedded_once(of_one, of_two):
    expected, num_texts, folder_of_one = of_one
    ours, theirs = (load_file(of_two / f"targets_first_{rank}.safetensors") for rank in (0, 1))
    assert torch.equal(ours["rows"], theirs["rows"])
    assert_close(ours["rows"], expected)
    assert expected.std(0).min() > 0.01, "vacuous: all rows are alike"
    assert 0 < num_texts < len(expected), "vacuous: no text is met twice"
    shares = [int(of["num_texts"]) for of in (ours, theirs)]
    assert sum(shares) == num_texts and min(shares) > num_texts / 4, "the work is shared out"
    parts = sorted(path.name for path in folder_of_one.iterdir())
    assert parts == sorted(path.name for path in (of_two / "cache").iterdir()) and len(parts) > 6
    for part in parts:
        one, two = (np.load(path / part) for path in (folder_of_one, of_two / "cache"))
        assert_close(two, one) if "rows" in part else np.testing.assert_array_equal(two, one)


def test_two_processes_read_their_cache_without_the_teacher_and_one_reads_it_too(folder, of_two):
    first = load_file(of_two / "targets_first_0.safetensors")["rows"]
    for rank in (0, 1):
        second = load_file(of_two / f"targets_second_{rank}.safetensors")
        assert int(second["num_texts"]) == 0 and torch.equal(second["rows"], first)
    training, machine = ranks.plans(ROOT / "params.yaml")
    rows, num_texts = ranks.targets(folder, training, machine, of_two / "cache")
    assert num_texts == 0 and torch.equal(rows, first)
