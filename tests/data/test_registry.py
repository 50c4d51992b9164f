"""data/sources.yaml: the papers' sums, what an entry must be, which sources a run takes."""

import re
from collections import Counter
from dataclasses import asdict, replace

import pytest
import yaml
from conftest import ROOT

from f2llm.data.converters import CONVERTERS, check_fields
from f2llm.data.registry import CONVERTER_NAMES, EMBEDDED_CONVERTERS, Source, choose_sources, load_registry
from f2llm.embedded.records import BUILDERS
from f2llm.reporting.readme import REGISTRY_MARKS, registry_markdown

FAMILIES = {  # sources and rows: arXiv 2603.19223, tables 8 and 9, summed by hand
    "Bitext Mining": (4, 14_575_277),
    "Question Answering": (47, 20_907_428),
    "Instruction Data": (23, 7_017_640),
    "Title Matching": (6, 4_359_289),
    "NLI": (7, 1_725_776),
    "Topic Classification": (16, 1_343_571),
    "Summarization": (4, 1_261_019),
    "Text-to-Code": (5, 1_229_579),
    "Code-to-Code": (3, 1_442_251),
    "Code-to-Text": (1, 936_813),
    "Paraphrase Detection": (6, 1_033_496),
    "Sentiment Analysis": (10, 946_725),
    "Intent Classification": (3, 755_838),
    "Domain Classification": (2, 745_845),
    "Language Classification": (1, 491_405),
    "Citation Prediction": (3, 389_183),
    "Linguistic Acceptability": (3, 175_246),
    "Claim Verification": (4, 202_905),
    "STS": (9, 608_652),
}
TASKS = {  # sources and rows of each paper
    "v2": {"retrieval": (118, 54_021_180), "clustering": (30, 5_554_559), "classification": (9, 572_199)},
    "v1": {"retrieval": (36, 4_918_949), "clustering": (19, 822_001), "classification": (5, 193_038)},
}
STAGE1 = {  # arXiv 2603.19223, data of stage 1
    "ParaCrawl": 10_684_184,
    "mMARCO": 5_470_174,
    "WebFAQ": 4_368_504,
    "CLIRMatrix": 3_275_561,
    "OCGI (OpenCodeGeneticInstruct)": 1_052_849,
    "CodeSearchNet": 936_813,
    "CodeSearchNet-ccr": 905_195,
}


@pytest.fixture(scope="module")
def v2(registry):
    return [source for source in registry if "v2" in source.recipes]


def grouped(sources, key):
    """{value of the key: (sources, published rows)}"""
    counts, rows = Counter(), Counter()
    for source in sources:
        counts[getattr(source, key)] += 1
        rows[getattr(source, key)] += source.published_rows
    return {value: (counts[value], rows[value]) for value in counts}


# The papers' numbers ----------------------------------------------------------------------------


def test_v2_has_the_papers_sources_and_rows_in_every_family(v2):
    assert grouped(v2, "family") == FAMILIES
    assert (len(v2), sum(source.published_rows for source in v2)) == (157, 60_147_938)
    assert list(dict.fromkeys(source.family for source in v2)) == list(FAMILIES), "not in the papers' order"


@pytest.mark.parametrize("recipe", TASKS)
def test_each_task_has_the_papers_sources_and_rows(registry, recipe):
    assert grouped([source for source in registry if recipe in source.recipes], "task") == TASKS[recipe]


def test_stage_1_takes_seven_sources_of_v2(v2):
    stage1 = {source.title: source.published_rows for source in v2 if source.stage1}
    assert stage1 == STAGE1
    assert sum(stage1.values()) == 26_693_280


def test_sources_that_v1_shares_have_its_instructions(registry):
    v1 = [source for source in registry if "v1" in source.recipes]
    assert len([source for source in v1 if "v2" in source.recipes]) == 50
    assert {source.instruction_from for source in v1} == {"v1"}


def test_mela_scala_and_dala_share_one_file_without_a_gap(v2):
    sharing = [source for source in v2 if source.files == ["mela"]]
    assert [source.title for source in sharing] == ["MELA", "ScaLA", "DaLA"]
    assert sharing[0].file_rows[0] == 0
    for source, following in zip(sharing, [*sharing[1:], None]):
        assert source.file_rows[1] - source.file_rows[0] == source.published_rows
        assert following is None or source.file_rows[1] == following.file_rows[0]


def test_every_source_of_the_papers_has_files_and_an_original(registry):
    papers = [source for source in registry if {"v1", "v2"} & set(source.recipes)]
    assert len(papers) == 167
    assert all(source.files and source.hub_id and source.languages for source in papers)
    files = {file for source in papers if "v2" in source.recipes for file in source.files}
    assert len(files) == 502 - 3, "the names in the authors' code without v1's cola, miracl and mrtidy"


def test_the_embedded_sources_cover_every_task_and_stage_1(registry):
    embedded = [source for source in registry if "embedded" in source.recipes]
    assert len(embedded) == 21
    assert {source.task for source in embedded} == {"retrieval", "clustering", "classification"}
    assert sum(source.stage1 for source in embedded) >= 4
    assert all(source.converter in EMBEDDED_CONVERTERS and source.commercial is True for source in embedded)


# What an entry must be --------------------------------------------------------------------------


def test_the_converters_are_those_that_exist():
    assert set(CONVERTER_NAMES) == CONVERTERS.keys() | BUILDERS.keys()
    assert set(EMBEDDED_CONVERTERS) == BUILDERS.keys()


def test_every_converter_takes_the_fields_of_its_sources(registry):
    sources = [source for source in registry if source.converter in CONVERTERS]
    assert len(sources) >= 90, f"vacuous: {len(sources)} sources have a converter"
    for source in sources:
        check_fields(source.converter, source.fields, source.name)


@pytest.fixture
def entries(registry):
    """Three small entries: one with rows of a file, the first source of v2 with a single file, an embedded one."""
    chosen = {"mela": 0, "squad": 1, "cldr_places": 2}
    return [
        asdict(source) for source in sorted(filter(lambda s: s.name in chosen, registry), key=lambda s: chosen[s.name])
    ]


def written(entries, tmp_path):
    path = tmp_path / "sources.yaml"
    path.write_text(yaml.safe_dump({"sources": entries}))
    return path


def test_a_written_registry_reads_back(registry, tmp_path):
    assert load_registry(written([asdict(source) for source in registry], tmp_path)) == registry


WRONG = [  # key, value, rule
    ("name", "two words", "of letters a-z, digits and underscores"),
    ("name", "Squad", "of letters a-z, digits and underscores"),
    ("title", "", "a line of text"),
    ("title", "two\nlines", "a line of text"),
    ("family", 3, "a line of text"),
    ("task", "ranking", "one of: retrieval, clustering, classification"),
    ("recipes", [], "a list of some of: v1, v2, embedded, local"),
    ("recipes", ["v3"], "a list of some of: v1, v2, embedded, local"),
    ("recipes", "v1", "a list of some of: v1, v2, embedded, local"),
    ("stage1", 1, "true or false"),
    ("published_rows", 0, "a number above 0, or null"),
    ("published_rows", True, "a number above 0, or null"),
    ("files", "squad", "a list of file stems"),
    ("files", [None], "a list of file stems"),
    ("file_rows", [5, 5], "null, or [first, last) with 0 <= first < last"),
    ("file_rows", [0, 1, 2], "null, or [first, last) with 0 <= first < last"),
    ("hub_id", " ", "the id of a dataset, github:owner/name, a URL, or null"),
    ("hub_revision", "main", "a commit sha of 40 hexadecimal digits, or null"),
    ("hub_files", "*.parquet", "a list of globs"),
    ("certainty", "sure", "one of: certain, likely, unknown"),
    ("languages", [], "a list of codes, their number, or null (counted at assembly)"),
    ("languages", [False], "a list of codes, their number, or null (counted at assembly)"),
    ("licence", "see the card", "an SPDX expression, LicenseRef-<name>, or unknown"),
    ("licence", "MIT and Apache-2.0", "an SPDX expression, LicenseRef-<name>, or unknown"),
    ("commercial", "maybe", "true, false or unknown"),
    ("commercial", 1, "true, false or unknown"),
    ("overlap", "STS12", "a list of MTEB tasks"),
    ("instruction", None, "a line of text"),
    ("instruction_from", "v2", "one of: v1, mteb, ours"),
    ("symmetric", "no", "true or false"),
    ("converter", "crawl", f"null or one of: {', '.join(CONVERTER_NAMES)}"),
    ("fields", [], "a table"),
    ("rows", 0, "a number above 0, or null"),
]


@pytest.mark.parametrize(("key", "value", "rule"), WRONG, ids=[f"{key}={value!r}" for key, value, _ in WRONG])
def test_a_wrong_value_is_named_with_its_entry_and_rule(entries, tmp_path, key, value, rule):
    entries[1][key] = value
    name = entries[1]["name"]
    with pytest.raises(ValueError) as error:
        load_registry(written(entries, tmp_path))
    path = tmp_path / "sources.yaml"
    assert str(error.value) == f"{path}, source 2 ({name}): {key} is {value!r}, but must be {rule}"


def test_every_key_has_a_wrong_value_among_these_tests():
    assert {key for key, _, _ in WRONG} == set(Source.__dataclass_fields__)


DISAGREE = {  # changes of the second entry: the message
    "stage 1 of another task": (
        {"stage1": True, "task": "clustering"},
        "stage1 is true and task clustering, but stage 1 takes retrieval sources only",
    ),
    "rows of two files": ({"file_rows": [0, 9], "files": ["a", "b"]}, "but files has 2 files, not one"),
    "rows of no file": ({"file_rows": [0, 9], "files": []}, "but files has 0 files, not one"),
    "a revision of nothing": ({"hub_id": None, "hub_revision": "0" * 40}, f"hub_revision is {'0' * 40}, but hub_id is"),
    "fields without a converter": ({"converter": None}, "but fields are {} exactly where converter is null"),
    "a converter without fields": ({"fields": {}}, "but fields are {} exactly where converter is null"),
    "an embedded converter": ({"converter": "message_pairs"}, "but the embedded sources and no others use: message_"),
    "an embedded source": ({"recipes": ["embedded"]}, "but the embedded sources and no others use: message_pairs"),
    "an unknown key": ({"colour": "red"}, "unknown key 'colour'; known keys: name, title"),
    "a misspelt key": ({"license": "MIT"}, "unknown key 'license'; did you mean 'licence'"),
    "a repeated name": ({"name": "mela"}, "name is 'mela', but must be unique, and source 1 has it"),
    "a file of another source": (
        {"files": ["mela"]},
        "files has 'mela', rows None, but in recipe v2 source 'mela' has its rows [0, 40267] (null: all)",
    ),
    "rows of another source": (
        {"files": ["mela"], "file_rows": [40266, 40300]},
        "files has 'mela', rows [40266, 40300], but in recipe v2 source 'mela' has its rows [0, 40267]",
    ),
    "a file twice": ({"files": ["a", "a"]}, "files has 'a', rows None, but in recipe v1 source 'squad'"),
}


@pytest.mark.parametrize(("changes", "message"), DISAGREE.values(), ids=DISAGREE)
def test_values_that_contradict_each_other_are_errors(entries, tmp_path, changes, message):
    entries[1] |= changes
    with pytest.raises(ValueError, match=rf"sources\.yaml, source 2 \(\w+\): .*{re.escape(message)}"):
        load_registry(written(entries, tmp_path))


def test_files_may_be_shared_across_recipes_and_by_rows(entries, tmp_path):
    entries[1] |= {"files": ["mela"], "file_rows": [40267, 40300]}
    assert len(load_registry(written(entries, tmp_path))) == 3
    entries[1] |= {"file_rows": None, "recipes": ["v1"]}
    assert len(load_registry(written(entries, tmp_path))) == 3


def test_a_missing_key_an_entry_that_is_no_table_and_an_empty_registry_are_errors(entries, tmp_path):
    with pytest.raises(ValueError, match=r"source 2 \('squad'|source 2 \(squad\): is no table"):
        load_registry(written([entries[0], "squad"], tmp_path))
    del entries[1]["licence"]
    with pytest.raises(ValueError, match=r"source 2 \(squad\): key 'licence' is missing; remedy"):
        load_registry(written(entries, tmp_path))
    with pytest.raises(ValueError, match="has no list 'sources'; remedy"):
        load_registry(written([], tmp_path))
    with pytest.raises(ValueError, match="is missing; remedy"):
        load_registry(tmp_path / "absent.yaml")


# Choosing ---------------------------------------------------------------------------------------


@pytest.fixture
def wanted(config):
    """The section `data` with other choices."""

    def choices(source="released", licences="all", only=(), leave_out=()):
        changes = {"licences": licences, "only": list(only), "leave_out": list(leave_out)}
        return replace(config.data, source=source, **changes)

    return choices


@pytest.mark.parametrize(
    ("source", "recipe", "count"),
    [("released", "v2", 157), ("released", "v1", 60), ("embedded", "v2", 21)],
)
def test_the_mixture_is_that_of_the_data_and_the_recipe(registry, source, recipe, count, wanted):
    chosen, left_out = choose_sources(registry, wanted(source), recipe)
    mixture = source if source == "embedded" else recipe
    assert chosen == [source for source in registry if mixture in source.recipes]
    assert (len(chosen), left_out) == (count, {})


def test_original_sets_that_the_registry_cannot_read_are_left_out_with_a_reason(registry, v2, wanted):
    chosen, left_out = choose_sources(registry, wanted("sources"), "v2")
    assert len(chosen) >= 90 and len(chosen) + len(left_out) == len(v2)
    assert all(source.converter and source.hub_files for source in chosen)
    assert set(left_out.values()) == {"no converter, or no files of the original set, in the registry"}


def test_an_entry_of_local_files_says_only_what_is_its_own(tmp_path):
    entry = {"name": "tickets", "recipes": ["local"], "task": "retrieval", "files": ["tickets.jsonl"]}
    entry |= {"licence": "unknown", "instruction": "Find the answer.", "symmetric": False}
    path = tmp_path / "sources.yaml"
    path.write_text(yaml.safe_dump({"sources": [entry]}))
    (source,) = load_registry(path)
    assert (source.title, source.stage1, source.converter, source.published_rows) == ("tickets", False, None, None)
    path.write_text(yaml.safe_dump({"sources": [entry | {"recipes": ["v2"]}]}))
    with pytest.raises(ValueError, match="key 'title' is missing; remedy: add it, nothing has a default"):
        load_registry(path)


def test_local_sources_are_found_by_their_recipe_and_stage_1_is_never_empty(registry, wanted):
    with pytest.raises(ValueError, match="no source has recipe 'local'; remedy: add one"):
        choose_sources(registry, wanted("local"), "v2")
    own = replace(registry[0], recipes=["local"], stage1=True)
    assert choose_sources([own, *registry], wanted("local"), "v2") == ([own], {})
    others = [replace(own, name="a", stage1=False), replace(own, name="b", stage1=False, task="clustering")]
    chosen, _ = choose_sources([own, *others], wanted("local"), "v2")
    assert [source.stage1 for source in chosen] == [True, False, False], "as marked"
    chosen, _ = choose_sources(others, wanted("local"), "v2")
    assert [source.stage1 for source in chosen] == [True, True], "all, where none is marked"


def test_every_source_that_is_left_out_has_its_reason(registry, v2, wanted):
    data = wanted(licences="commercial", only=["fiqa", "snli", "anli", "cord19", "paracrawl"], leave_out=["snli"])
    chosen, left_out = choose_sources(registry, data, "v2")
    assert [source.name for source in chosen] == ["paracrawl"]
    assert len(chosen) + len(left_out) == len(v2)
    assert {name: left_out[name] for name in ("mnli", "snli", "fiqa", "anli", "cord19")} == {
        "mnli": "not named in data.only",
        "snli": "named in data.leave_out",
        "fiqa": "licence unknown",
        "anli": "no commercial use",
        "cord19": "commercial use unknown",
    }


def test_licences_leave_out_what_they_say(registry, v2, wanted):
    known, without = choose_sources(registry, wanted(licences="known"), "v2")
    assert {source.name for source in v2 if source.licence == "unknown"} == without.keys() != set()
    assert set(without.values()) == {"licence unknown"}
    commercial, _ = choose_sources(registry, wanted(licences="commercial"), "v2")
    assert commercial == [source for source in known if source.commercial is True]
    assert 0 < len(commercial) < len(known) < len(v2)


@pytest.mark.parametrize("key", ["only", "leave_out"])
def test_a_name_that_is_none_of_the_mixture_is_an_error_with_close_ones(registry, key, wanted):
    message = f"data.{key} names 'squat', which is none of the 157 sources of v2; did you mean 'squad'"
    with pytest.raises(ValueError, match=message):
        choose_sources(registry, wanted(**{key: ["squat"]}), "v2")
    with pytest.raises(ValueError, match="'msmarco', which is none of the 157 sources of v2"):
        choose_sources(registry, wanted(**{key: ["msmarco"]}), "v2")


def test_leaving_out_all_of_stage_1_is_an_error_where_there_is_a_stage_1(registry, v2, wanted):
    stage1 = [source.name for source in v2 if source.stage1]
    with pytest.raises(ValueError, match=r"stage 1 of v2 remains, 150 .*: 7 named in data\.leave_out; rem"):
        choose_sources(registry, wanted(leave_out=stage1), "v2")
    chosen, _ = choose_sources(registry, wanted(only=["squad"]), "v1")
    assert [source.name for source in chosen] == ["squad"]


def test_leaving_out_everything_is_an_error_that_counts_the_reasons(registry, wanted):
    data = wanted(only=["fiqa", "snli"], leave_out=["snli"], licences="known")
    message = "none of the 60 sources of v1 remain: 58 not named in data.only, .*1 named in data.leave_out"
    with pytest.raises(ValueError, match=message):
        choose_sources(registry, data, "v1")


# Showing ----------------------------------------------------------------------------------------


def test_the_markdown_has_the_papers_totals_and_a_row_for_every_source(registry):
    text = registry_markdown(registry)
    assert "| v2 | 157 | 157 | 60,147,938 | 60,147,938 | 26,693,280 | 26,693,280 |" in text
    assert "| v1 | 60 | 60 | 5,933,988 | 5,933,988 | 0 | 0 |" in text
    tables = [line for line in text.split("###", 1)[1].splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in tables]
    assert {len(row) for row in rows} == {9}
    assert Counter(row[0] for row in rows) - Counter({"source": 19}) == Counter(s.title for s in registry)
    numbers = [int(row[4].replace(",", "")) for row in rows if re.fullmatch(r"[\d,]+", row[4]) and "v2" in row[1]]
    assert sum(numbers) == 60_147_938


def test_the_markdown_shows_sums_of_its_own(registry):
    text = registry_markdown([source for source in registry if source.name in ("squad", "paracrawl")])
    assert "| v2 | 2 | 157 | 10,773,693 | 60,147,938 | 10,684,184 | 26,693,280 |" in text


def test_the_readme_of_the_data_is_that_of_the_registry(registry):
    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    tables = text.split(REGISTRY_MARKS[0])[1].split(REGISTRY_MARKS[1])[0]
    assert tables.strip() == registry_markdown(registry), "remedy: f2llm readme"
