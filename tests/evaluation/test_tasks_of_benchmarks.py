"""The 17 benchmarks, their 430 tasks and instructions, against the installed mteb."""

import re

import pandas as pd
import pytest
from conftest import ROOT

from f2llm.evaluation.benchmarks import BENCHMARKS, benchmark_table, instructions, leaves, tasks_of
from f2llm.evaluation.library import mteb
from f2llm.evaluation.tasks import Encoder


@pytest.fixture(scope="module")
def table():
    return benchmark_table()


def test_the_17_benchmarks_have_608_tasks_and_430_different_ones(table):
    assert len(BENCHMARKS) == table["benchmark"].nunique() == 17
    assert len(table) == 608 and table["task"].nunique() == 430


def test_the_published_table_of_instructions_has_exactly_these_tasks(table):
    shipped = pd.read_csv(ROOT / "data" / "published" / "instructions.csv", keep_default_na=False)
    assert set(shipped["task"]) == set(table["task"]) and shipped["task"].is_unique
    assert (shipped["v2"] != "").all()
    assert shipped[shipped["v1"] == ""]["task"].tolist() == ["SynPerChatbotConvSAClassification"], "mteb has none"


@pytest.mark.parametrize("recipe, model", [("v1", "codefuse-ai/F2LLM-0.6B"), ("v2", "codefuse-ai/F2LLM-v2-0.6B")])
def test_instructions_are_those_that_mteb_gives_the_published_models(table, recipe, model):
    """The registry's prompts through mteb's own rule are the oracle."""
    from mteb.types import PromptType

    registry = mteb().get_model_meta(model).loader_kwargs["prompts_dict"]
    theirs, ours = Encoder(None, "theirs", registry), Encoder(None, "ours", instructions(recipe))
    searches, differ = 0, set()
    for name in dict.fromkeys(table["task"]):
        metadata = mteb().get_task(name).metadata
        search = metadata.type in ("Retrieval", "Reranking", "InstructionReranking")
        kind, searches = (PromptType.query, searches + 1) if search else (None, searches)
        assert ours.prompt_of(metadata, kind) == theirs.get_instruction(metadata, kind), name
        assert not search or ours.prompt_of(metadata, PromptType.document) is None
        differ.add(ours.prompt_of(metadata, kind))
    assert searches == 152 and len(differ) > 30, "vacuous"


@pytest.mark.parametrize("recipe, model", [("v1", "codefuse-ai/F2LLM-0.6B"), ("v2", "codefuse-ai/F2LLM-v2-0.6B")])
def test_a_task_outside_the_table_gets_what_mteb_gives(recipe, model):
    from mteb.types import PromptType

    registry = mteb().get_model_meta(model).loader_kwargs["prompts_dict"]
    for name, kind in (("SpanishNewsClassification", None), ("FaithDial", PromptType.query)):
        metadata = mteb().get_task(name).metadata
        assert name not in instructions(recipe), "vacuous: it is in the table"
        ours = Encoder(None, "ours", instructions(recipe)).prompt_of(metadata, kind)
        assert ours == Encoder(None, "theirs", registry).get_instruction(metadata, kind)


def test_every_call_gives_new_tasks_and_leaves_mtebs_own_alone():
    (one,), (two,) = tasks_of("STS22"), tasks_of("STS22", ["deu"])
    assert one is not two and len(two.hf_subsets) < len(one.hf_subsets) == len(mteb().get_task("STS22").hf_subsets)
    first, second = (next(iter(tasks_of("MTEB(kor, v1)"))) for _ in range(2))
    own = next(iter(mteb().get_benchmark("MTEB(kor, v1)").tasks))
    assert own.metadata.name == first.metadata.name
    assert len({id(first), id(second), id(own)}) == 3 and first.rng_state is not own.rng_state


def test_languages_choose_subsets_but_never_a_part_of_clustering(capsys):
    (labels,) = tasks_of("SIB200Classification", ["fra", "swe-Latn"])
    assert labels.hf_subsets == ["fra_Latn", "swe_Latn"]
    (clusters,) = tasks_of("SIB200ClusteringS2S", ["fra"])
    assert len(clusters.hf_subsets) == 197
    assert [task.metadata.name for task in tasks_of(["KorSTS", "JSTS"], ["jpn"])] == ["JSTS"]
    assert capsys.readouterr().out == "left out, without jpn: KorSTS\n"


def test_two_benchmarks_ask_for_the_parts_of_both():
    parts = [tasks_of(name) for name in ("MTEB(fra, v1)", "MTEB(deu, v1)")]
    both = {task.metadata.name: set(task.hf_subsets) for task in tasks_of(["MTEB(fra, v1)", "MTEB(deu, v1)"])}
    shared = [name for name in both if all(name in {task.metadata.name for task in part} for part in parts)]
    assert shared
    for name in shared:
        asked = [set(task.hf_subsets) for part in parts for task in part if task.metadata.name == name]
        assert both[name] == asked[0] | asked[1]


def test_an_aggregate_task_reads_the_data_of_its_parts():
    (task,) = tasks_of("SynPerChatbotConvSAClassification")
    assert len(leaves([task])) == 9 and task not in leaves([task])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("MTEB(eng,v2)",), "no benchmark and no task 'MTEB(eng,v2)'; did you mean 'MTEB(eng, v2)'"),
        ((["KorSTS", "KorST"],), "no benchmark and no task 'KorST'; did you mean 'KorSTS'"),
        (("KorSTS", ["german"]), "language 'german' is unknown to mteb"),
        (("KorSTS", ["deu"]), "no task of KorSTS has deu; remedy"),
        (("KorSTS", [], ["dev"]), "KorSTS has no split 'dev'; remedy: one of test"),
    ],
)
def test_what_mteb_does_not_have_is_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tasks_of(*arguments)
