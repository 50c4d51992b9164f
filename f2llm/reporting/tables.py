"""Tables of the report, from results/*.csv, the manifest of the data and the logs beside the models."""

import json
from datetime import timedelta
from pathlib import Path

import pandas as pd
from pandas.io.formats.style import Styler

LABELS = {
    "tfidf": "TF-IDF",
    "untrained": "untrained",
    "backbone": "backbone",
    "stage1": "stage 1",
    "stage2": "stage 2",
}
TYPES = {"BitextMining": "Bitext", "PairClassification": "Pair classification"}  # MTEB's other names stay as is
TASKS = {
    "CldrNamesBitext": "CLDR's names, Latin script",
    "CldrNamesCrossScriptBitext": "CLDR's names, other scripts",
    "CldrPhrasesBitext": "CLDR's phrases, Latin script",
    "CldrPhrasesCrossScriptBitext": "CLDR's phrases, other scripts",
    "DjangoBitext": "Django's messages, Latin script",
    "DjangoCrossScriptBitext": "Django's messages, other scripts",
    "HomeAssistantBitext": "Home Assistant's messages, Latin script",
    "HomeAssistantCrossScriptBitext": "Home Assistant's messages, other scripts",
    "ZeroShotLanguagesBitext": "languages not in training",
    "DocstringToCodeRetrieval": "code of a docstring",
    "SummaryToBodyRetrieval": "rest of a docstring",
    "NameToExplanationRetrieval": "explanation of a name, English",
    "CrossLingualExplanationRetrieval": "explanation of a name, across languages",
    "DjangoMessageReranking": "Django's messages",
    "IntegrationMessageReranking": "Home Assistant's messages",
    "TenseClassification": "future or past",
    "NameKindClassification": "kinds of names",
    "MessagePurposeClassification": "purpose of a message",
    "LanguageClassification": "language of a message",
    "PackageClustering": "docstrings by package",
    "QuantityClustering": "quantities by kind",
    "IntegrationClustering": "messages by integration",
    "TranslationPairClassification": "translation or not",
    "ListOverlapSTS": "overlap of lists",
}
GOALS = (
    "Stage 2 scores at least 3 times as high as the untrained model on retrieval and bitext",
    "Stage 2 is above TF-IDF and above stage 1 in the mean over all tasks",
    "Distillation improves every pruned student",
    "The student with half of the non-embedding parameters keeps at least 90% of its teacher's mean",
)


def label(model: str) -> str:
    """A model's name for readers: 'pico-pruned' -> 'pico, pruned', 'stage2@8' -> 'stage 2 at 8 dimensions'."""
    name, _, dim = model.partition("@")
    return LABELS.get(name, name.replace("-", ", ")) + (f" at {dim} dimensions" if dim else "")


def read_scores(folder: Path) -> pd.DataFrame:
    """results/scores.csv, checked."""
    path = Path(folder) / "results" / "scores.csv"
    if not path.exists():
        raise ValueError(f"{path} is missing; remedy: make repro")
    scores = pd.read_csv(path)
    if list(scores.columns) != ["model", "task", "type", "score"]:
        raise ValueError(
            f"{path} has columns {list(scores.columns)}, not model, task, type, score; remedy: dvc repro -f evaluate"
        )
    return scores


def means_by_type(scores: pd.DataFrame) -> pd.DataFrame:
    """One row per model: the mean over all tasks, bitext between scripts, and the mean of each type, 0 to 1."""
    order = list(dict.fromkeys(scores["model"]))
    types = scores.pivot_table(index="model", columns="type", values="score", aggfunc="mean").rename(columns=TYPES)
    between_scripts = scores[scores["task"].str.contains("CrossScript")].groupby("model")["score"].mean()
    table = types.assign(mean=scores.groupby("model")["score"].mean())
    if len(between_scripts):
        table = table.assign(between=between_scripts)
    first = [column for column in ("mean", "Bitext", "between", "Retrieval") if column in table]
    table = table[first + [column for column in types.columns if column not in first]].loc[order]
    return table.rename(columns={"mean": "Mean", "between": "Bitext between scripts"})


def table_by_type(scores: pd.DataFrame) -> pd.DataFrame:
    """`means_by_type` times 100, with the names of models for readers."""
    return (100 * means_by_type(scores)).round(1).rename(index=label)


def table_by_task(scores: pd.DataFrame) -> pd.DataFrame:
    """One row per model: the mean, and the score of each task, tasks of one type together; times 100."""
    order = list(dict.fromkeys(scores["model"]))
    tasks = scores.drop_duplicates("task").set_index("task")["type"]
    types = list(dict.fromkeys(tasks))
    tasks = tasks.sort_values(key=lambda kinds: kinds.map(types.index), kind="stable")
    table = scores.pivot(index="model", columns="task", values="score").loc[order, tasks.index]
    table.insert(0, "Mean", table.mean(axis=1))
    words = {task: f"{TYPES.get(kind, kind)}: {TASKS.get(task, task)}" for task, kind in tasks.items()}
    return (100 * table).round(1).rename(index=label, columns=words).rename_axis(None).rename_axis(None, axis=1)


def by_models(compared: pd.DataFrame) -> list[tuple[tuple[str, ...], pd.DataFrame]]:
    """(models, rows with a difference) of `ablations.compare`'s table: groups with the same models together."""
    rows = compared.dropna(subset="difference")
    models_of = {group: tuple(dict.fromkeys(part["model"])) for group, part in rows.groupby("group", sort=False)}
    return [(models, rows[rows["group"].map(models_of) == models]) for models in dict.fromkeys(models_of.values())]


def table_of_students(scores: pd.DataFrame, parameters: pd.DataFrame) -> pd.DataFrame:
    """One row per student: mean scores times 100 when pruned, when distilled, of its teacher; shares of the teacher's.

    parameters: model, without_embeddings. share of gain: (student - untrained) / (teacher - untrained).
    """
    mean, size = scores.groupby("model")["score"].mean(), parameters.set_index("model")["without_embeddings"]
    gain = mean["stage2"] - mean["untrained"]
    rows = {
        name: {
            "share of parameters": size[f"{name}-distilled"] / size["stage2"],
            "pruned": 100 * mean[f"{name}-pruned"],
            "distilled": 100 * mean[f"{name}-distilled"],
            "teacher": 100 * mean["stage2"],
            "share of teacher's mean": mean[f"{name}-distilled"] / mean["stage2"],
            "share of gain, pruned": (mean[f"{name}-pruned"] - mean["untrained"]) / gain,
            "share of gain, distilled": (mean[f"{name}-distilled"] - mean["untrained"]) / gain,
        }
        for name in _students(scores)
    }
    return pd.DataFrame(rows).T


def goals(scores: pd.DataFrame, parameters: pd.DataFrame) -> pd.DataFrame:
    """The goals set before the run: goal, measured, met. Left out: goals about models that were not scored.

    scores: model, task, type, score. parameters: model, without_embeddings.
    """
    mean = _means(scores)
    search = _means(scores[scores["type"].isin(["Retrieval", "BitextMining"])])
    size = parameters.set_index("model")["without_embeddings"]
    students, rows = _students(scores), []
    if {"untrained", "stage2"} <= set(search.index):
        ratio = search["stage2"] / search["untrained"]
        shown = f"{ratio:.2f} times: {search['stage2']:.1f} against {search['untrained']:.1f}"
        rows.append((GOALS[0], shown, ratio >= 3))
    if {"tfidf", "stage1", "stage2"} <= set(mean.index):
        shown = f"{mean['stage2']:.1f} against {mean['tfidf']:.1f} and {mean['stage1']:.1f}"
        rows.append((GOALS[1], shown, mean["stage2"] > max(mean["tfidf"], mean["stage1"])))
    if students:
        gains = {name: mean[f"{name}-distilled"] - mean[f"{name}-pruned"] for name in students}
        shown = ", ".join(f"{name} {gain:+.1f}" for name, gain in gains.items())
        rows.append((GOALS[2], f"points: {shown}", min(gains.values()) > 0))
    for name in students if "stage2" in mean else []:
        if 0.45 <= size[f"{name}-distilled"] / size["stage2"] <= 0.55:
            share = mean[f"{name}-distilled"] / mean["stage2"]
            rows.append((GOALS[3], f"{name} keeps {share:.1%}", share >= 0.9))
    return pd.DataFrame(rows, columns=["goal", "measured", "met"]).astype({"met": bool})


def _means(scores: pd.DataFrame) -> pd.Series:
    """Mean score of each model, times 100."""
    return 100 * scores.groupby("model", sort=False)["score"].mean()


def _students(scores: pd.DataFrame) -> list[str]:
    """Students that were scored both pruned and distilled."""
    models = list(dict.fromkeys(scores["model"]))
    names = [model.removesuffix("-distilled") for model in models if model.endswith("-distilled")]
    return [name for name in names if f"{name}-pruned" in models]


# What was run -----------------------------------------------------------------------------------


def read_train_facts(folder: Path) -> dict:
    """train.json of a trained model."""
    return json.loads((Path(folder) / "train.json").read_text())


def table_of_trainings(facts: dict[str, dict], parameters: pd.DataFrame) -> pd.DataFrame:
    """One row per training that took steps. facts: each model's train.json, by its name.

    parameters: model, parameters, without_embeddings.
    """
    rows = {
        name: {
            "steps": fact["steps"],
            "tokens": fact["tokens"],
            "seconds": fact["seconds"],
            "tokens per second": fact["tokens"] / max(fact["seconds"], 0.1),  # seconds are rounded to tenths
            "peak memory (MiB)": fact["peak_memory_mib"],
        }
        for name, fact in facts.items()
        if fact["steps"]
    }
    size = parameters.set_index("model")[["parameters", "without_embeddings"]]
    table = pd.DataFrame.from_dict(rows, orient="index").join(size)
    return table.rename(index=label, columns={"without_embeddings": "non-embedding parameters"})


def run_summary(facts: dict[str, dict], manifest: dict, scores: pd.DataFrame, commit: str) -> dict[str, str]:
    """A summary of the run: data, evaluation, machine, times, versions. facts: each model's train.json, by its name."""
    sources, last = manifest["sources"].values(), facts["stage2"]
    languages = {code for source in sources for code in source["languages"] if len(code) <= 3}  # not "python"
    tuples = f"{sum(source['kept'] for source in sources):,} tuples of {len(sources)} sources"
    tasks = f"{scores['task'].nunique()} held-out tasks of {scores['type'].nunique()} types"
    machines = {
        f"{fact['device']}, threads: {fact['threads']}, processes: {fact['processes']}" for fact in facts.values()
    }
    seconds = dict.fromkeys(["stage 1", "stage 2", "distillation"], 0.0)
    for name, fact in facts.items():
        seconds["distillation" if name.endswith("-distilled") else label(name)] += fact["seconds"]
    times = [f"{stage} {_clock(time)}" for stage, time in seconds.items() if round(time)]
    versions = {"Python": last["python"]} | last["versions"]
    return {
        "Data": tuples + (f" in {len(languages)} languages" if languages else ""),
        "Evaluation": f"{tasks}; models scored: {scores['model'].nunique()}",
        "Trained on": "; ".join(sorted(machines)),
        "Training time": f"{_clock(sum(seconds.values()))} (h:mm:ss): {', '.join(times)}",
        "Versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "Commit": commit or "unknown",
    }


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds: '0:02:25'."""
    return str(timedelta(seconds=round(seconds)))


# For readers ------------------------------------------------------------------------------------


def language_name(code: str) -> str:
    """The English name of an ISO 639 code, from CLDR: 'deu' -> 'German'. A code that it lacks stays unchanged."""
    from babel import Locale
    from babel.core import get_global

    return Locale("en").languages.get(get_global("language_aliases").get(code, code), code)


def script_name(code: str) -> str:
    """The script that a language is mostly written in, from CLDR: 'hin' -> 'Devanagari'; '' if CLDR does not say."""
    from babel import Locale
    from babel.core import get_global

    short = get_global("language_aliases").get(code, code)
    parts = get_global("likely_subtags").get(short, "").split("_")
    return Locale("en").scripts.get(parts[1], "") if len(parts) > 1 else ""


def lowest_languages(languages: pd.DataFrame, model: str, count: int = 10) -> pd.DataFrame:
    """language, script, score (times 100, mean over bitext tasks) of a model's languages with the lowest scores.

    Empty if no bitext task was scored.
    """
    means = languages[languages["model"] == model].groupby("language")["score"].mean().sort_values().head(count)
    rows = [(language_name(code), script_name(code), 100 * score) for code, score in means.items()]
    return pd.DataFrame(rows, columns=["language", "script", "bitext F1 x 100"])


def styled(table: pd.DataFrame, digits: str = "{:.1f}", best: int | None = None) -> Styler:
    """A table for the report: numbers formatted by `digits`, text aligned left, the best value in bold.

    best: 0 for the best value of each column, 1 of each row, None for no bold.
    """
    numbers = table.select_dtypes("number").columns
    text = table.columns.difference(numbers)
    style = table.style.format(digits, subset=numbers, na_rep="")
    to_left = [{"selector": selector, "props": "text-align: left"} for selector in ("td", "th.col_heading")]
    style = style.set_table_styles(dict.fromkeys(text, to_left))
    return style if best is None else style.highlight_max(axis=best, subset=numbers, props="font-weight: bold")
