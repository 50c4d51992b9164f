"""Published scores: their means against the papers' tables, and verdicts of the ledger."""

import pandas as pd
import pytest

from f2llm.evaluation.benchmarks import BENCHMARKS, benchmark_table
from f2llm.evaluation.ledger import (
    VERIFIED,
    against_of,
    ledger_of,
    ledger_of_subsets,
    means,
    paper_means,
    published,
    published_models,
    published_subsets,
)
from f2llm.evaluation.library import mteb

F2LLM = [name for name in published_models().index if name.startswith("F2LLM")]
# By how much a mean of the published results may differ from the paper's table, x 100, and why.
EXCEPTIONS = {
    "MTEB(Multilingual, v2)": 0.06,  # FloresBitextMining is not among the results of the v2 models
    "MTEB(Europe, v1)": 0.44,  # the same
    "MTEB(cmn, v1)": 0.04,  # 31 tasks in mteb 2.26, 32 in the paper
    "MTEB(fas, v2)": 0.42,  # prompts of SynPerChatbotConvSA were corrected after the paper (mteb #4363)
}
WITHOUT_A_RESULT = {("JMTEB(v2)", "F2LLM-v2-80M"): 0.79}  # one task of the 80M is missing


def test_the_published_scores_are_of_11_models_and_all_tasks_but_one():
    assert len(F2LLM) == 11
    tasks = set(benchmark_table().itertuples(index=False, name=None))
    of_8b = published()[published()["model"] == "F2LLM-v2-8B"]
    missing = tasks - set(of_8b[["benchmark", "task"]].itertuples(index=False, name=None))
    assert missing == {(name, "FloresBitextMining") for name in ("MTEB(Multilingual, v2)", "MTEB(Europe, v1)")}
    assert published()["score"].between(-1, 1).all()


@pytest.mark.parametrize("model", F2LLM)
def test_means_of_published_scores_are_the_papers(model):
    recomputed = 100 * published()[published()["model"] == model].groupby("benchmark")["score"].mean()
    paper = paper_means()[paper_means()["model"] == model].set_index("benchmark")["mean"]
    assert len(paper) == (17 if "-v2-" in model else 1)
    for benchmark, mean in paper.items():
        allowed = WITHOUT_A_RESULT.get((benchmark, model), EXCEPTIONS.get(benchmark, 0.01))
        assert abs(recomputed[benchmark] - mean) < allowed + 0.005, (benchmark, recomputed[benchmark], mean)


def test_an_exception_is_one_that_is_needed():
    recomputed = 100 * published().groupby(["model", "benchmark"])["score"].mean()
    for benchmark in EXCEPTIONS:
        paper = paper_means()[paper_means()["benchmark"] == benchmark]
        assert max(abs(recomputed[row.model, benchmark] - row.mean) for row in paper.itertuples()) > 0.01


def scores_of(benchmark, model, change=0.0, leave_out=()):
    """Rows as an evaluation gives them: the published score of each task in each of its parts, changed."""
    theirs = published()[(published()["model"] == model) & (published()["benchmark"] == benchmark)]
    theirs = theirs.set_index("task")["score"]
    rows = [
        (task.metadata.name, split, subset, theirs[task.metadata.name] + change)
        for task in mteb().get_benchmark(benchmark).tasks
        if task.metadata.name not in leave_out
        for split in task.eval_splits
        for subset in task.hf_subsets
    ]
    return pd.DataFrame(rows, columns=["task", "split", "subset", "score"])


def test_the_published_scores_themselves_are_equal():
    scores = scores_of("MTEB(kor, v1)", "F2LLM-v2-330M")
    ledger = ledger_of(scores, "codefuse-ai/F2LLM-v2-330M", "r" * 40, "F2LLM-v2-330M")
    korean = ledger[ledger["benchmark"] == "MTEB(kor, v1)"]
    assert len(korean) == 6 and (korean["verdict"] == "equal").all()
    (mean,) = means(korean).to_dict("records")
    assert mean["published"] == pytest.approx(68.70, abs=0.005) and mean["tasks"] == "6 of 6"
    others = set(ledger["benchmark"]) - {"MTEB(kor, v1)"}
    assert others and others <= set(BENCHMARKS), "tasks that other benchmarks share are listed there, too"


def test_a_difference_beyond_the_tolerance_is_named_and_clustering_has_a_wider_one():
    scores = scores_of("MTEB(fra, v1)", "F2LLM-v2-330M", change=0.005)
    ledger = ledger_of(scores, "codefuse-ai/F2LLM-v2-330M", "r" * 40, "F2LLM-v2-330M")
    french = ledger[ledger["benchmark"] == "MTEB(fra, v1)"].groupby("type")["verdict"].unique().map(list)
    assert french["Clustering"] == ["equal"] and french["STS"] == french["Retrieval"] == ["DIFFERENT"]


def test_other_weights_are_judged_by_the_mean_of_a_benchmark():
    for change, verdict in ((-0.009, "reached"), (0.03, "reached"), (-0.011, "NOT reached")):
        scores = scores_of("MTEB(kor, v1)", "F2LLM-v2-330M", change)
        ledger = ledger_of(scores, "f2llm/mine", "r" * 40, "F2LLM-v2-330M")
        korean = ledger[ledger["benchmark"] == "MTEB(kor, v1)"]
        assert set(korean["verdict"]) == {"other weights"} and korean["tolerance"].isna().all()
        assert means(korean)["verdict"].tolist() == [verdict]


def test_what_cannot_be_compared_has_a_reason_and_no_part_in_the_mean():
    scores = scores_of("MTEB(kor, v1)", "F2LLM-v2-330M", leave_out=["KorSTS"])
    scores = scores[(scores["task"] != "KLUE-TC") | (scores["split"] != "validation")]
    whole = scores_of("MTEB(fra, v1)", "F2LLM-v2-330M")
    part = whole[(whole["task"] == "SIB200ClusteringS2S")].iloc[:0]
    ledger = ledger_of(pd.concat([scores, part]), "codefuse-ai/F2LLM-v2-330M", "r" * 40, "F2LLM-v2-330M")
    korean = ledger[ledger["benchmark"] == "MTEB(kor, v1)"].set_index("task")
    assert korean["verdict"]["KorSTS"] == "not comparable: not run"
    assert korean["ours"].isna().sum() == korean["verdict"].str.startswith("not comparable").sum() >= 1
    (mean,) = means(korean.reset_index()).to_dict("records")
    assert mean["verdict"].startswith("reached, on ") and mean["tasks"].endswith(" of 6")
    europe = scores_of("MTEB(kor, v1)", "F2LLM-v2-330M").assign(task="FloresBitextMining")
    flores = ledger_of(europe, "f2llm/mine", "", "F2LLM-v2-330M").set_index("task")["verdict"]["FloresBitextMining"]
    assert (flores.str.startswith("not comparable")).all()


def test_a_task_that_failed_says_so():
    scores = scores_of("MTEB(kor, v1)", "F2LLM-v2-330M", leave_out=["KorSTS"])
    ledger = ledger_of(scores, "f2llm/mine", "", "F2LLM-v2-330M", {"KorSTS": "no such file"})
    assert ledger.set_index("task")["verdict"]["KorSTS"] == "not comparable: failed, no such file"


def test_a_task_in_part_is_not_compared_with_the_whole():
    scores = scores_of("MTEB(Indic, v1)", "F2LLM-v2-330M")
    name = scores["task"].value_counts().index[0]
    dropped = scores[scores["task"] == name].index[0]
    ledger = ledger_of(scores.drop(dropped), "codefuse-ai/F2LLM-v2-330M", "", "F2LLM-v2-330M")
    row = ledger[(ledger["benchmark"] == "MTEB(Indic, v1)") & (ledger["task"] == name)].iloc[0]
    assert row["verdict"].startswith("not comparable: 1 of ") and pd.isna(row["difference"])


def test_without_a_model_to_compare_with_the_ledger_is_empty():
    assert ledger_of(scores_of("MTEB(kor, v1)", "F2LLM-v2-330M"), "f2llm/nano", "", None).empty


def test_a_run_is_compared_with_the_published_model_of_its_size_and_recipe():
    assert against_of("codefuse-ai/F2LLM-v2-80M") == "F2LLM-v2-80M"
    assert against_of("f2llm/stage2", {"recipe": "v2", "size_name": "1.7B"}) == "F2LLM-v2-1.7B"
    assert against_of("f2llm/stage2", {"recipe": "v1", "size_name": "4B"}) == "F2LLM-4B"
    assert against_of("f2llm/stage2", {"recipe": "v2", "size_name": "nano"}) is against_of("f2llm/other") is None


def test_all_that_is_verified_has_published_scores():
    theirs = set(published_subsets()[["task", "subset"]].itertuples(index=False, name=None))
    for task, subsets in VERIFIED.items():
        for subset in subsets or mteb().get_task(task).hf_subsets:
            assert (task, subset) in theirs
    rows = published_subsets().assign(type="STS", model="m")[["task", "split", "subset", "score", "type"]].head(5)
    assert set(ledger_of_subsets(rows, "r")["verdict"]) == {"equal"}
    changed = ledger_of_subsets(rows.assign(score=rows["score"] + 0.002), "r")
    assert set(changed["verdict"]) == {"DIFFERENT"}
    unknown = ledger_of_subsets(rows.assign(subset="none"), "r")
    assert set(unknown["verdict"]) == {"not comparable: no published score"}
