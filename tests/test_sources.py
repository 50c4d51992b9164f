"""The registry of sources: what an entry must have, and what a source's records look like."""

import re
from dataclasses import asdict, replace

import pytest
import yaml

from f2llm.sources import COLUMNS, choose_sources, load_registry, load_source


@pytest.fixture
def entries(registry):
    """The registry as plain tables, to be changed and written again."""
    return [asdict(source) for source in registry]


def written(entries, tmp_path):
    path = tmp_path / "sources.yaml"
    path.write_text(yaml.safe_dump({"sources": entries}))
    return path


def test_the_registry_holds_every_task_and_stage_1_sources(registry):
    assert len(registry) >= 8
    assert {source.task for source in registry} == {"retrieval", "clustering", "classification"}
    assert sum(source.stage1 for source in registry) >= 4
    assert all(source.instruction.endswith((".", "?")) and source.licence for source in registry)
    assert all("embedded" in source.recipes for source in registry)


def test_a_written_registry_reads_back(entries, registry, tmp_path):
    assert load_registry(written(entries, tmp_path)) == registry


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "ranking"}, "task is 'ranking', but must be one of: retrieval, clustering, classification"),
        ({"builder": "crawl"}, "builder is 'crawl', but must be one of: bitext"),
        ({"colour": "red"}, "missing or unknown keys ['colour']"),
        ({"task": "clustering"}, "stage1 is true, but stage 1 takes retrieval sources only"),
        ({"name": "two words"}, "the name must be unique, of letters, digits and underscores"),
    ],
)
def test_a_wrong_entry_is_named_with_its_rule(entries, tmp_path, change, message):
    assert entries[0]["stage1"], "vacuous: the first source is not of stage 1"
    entries[0] |= change
    with pytest.raises(ValueError, match=rf"sources\.yaml, source 1 .*{re.escape(message)}"):
        load_registry(written(entries, tmp_path))


def test_a_missing_key_a_repeated_name_and_an_empty_registry_are_errors(entries, tmp_path):
    del entries[1]["licence"]
    with pytest.raises(ValueError, match=r"source 2 .*\['licence'\]"):
        load_registry(written(entries, tmp_path))
    with pytest.raises(ValueError, match=r"source 2 .*name must be unique"):
        load_registry(written([entries[0], entries[0]], tmp_path))
    with pytest.raises(ValueError, match="has no list 'sources'; remedy"):
        load_registry(written([], tmp_path))
    with pytest.raises(ValueError, match="is missing; remedy"):
        load_registry(tmp_path / "absent.yaml")


@pytest.mark.parametrize("task", COLUMNS)
def test_records_have_the_columns_of_their_task_and_at_most_the_rows_asked_for(registry, config, texts, task):
    source = replace(next(source for source in registry if source.task == task), rows=300)
    records = load_source(source, config.data, seed=0)
    assert 200 <= len(records) <= 300
    assert COLUMNS[task] <= set(records.column_names)
    assert all(record[column] for record in records for column in COLUMNS[task])


def test_a_draw_depends_on_seed_and_name_only(registry, config, texts):
    source = replace(next(source for source in registry if source.builder == "function_pairs"), rows=50)
    first, again, other = (load_source(source, config.data, seed).to_list() for seed in (0, 0, 1))
    assert first == again != other
    renamed = load_source(replace(source, name="other"), config.data, 0).to_list()
    assert renamed != first


def test_a_source_that_selects_nothing_is_an_error(registry, config, texts):
    source = replace(registry[0], fields=registry[0].fields | {"domains": ["nothing"]})
    with pytest.raises(ValueError, match=f"'{source.name}' has no rows; fields .*nothing"):
        load_source(source, config.data, seed=0)


# Choosing ---------------------------------------------------------------------------------------


def test_sources_are_those_of_the_data_without_those_left_out(registry, config):
    assert choose_sources(registry, replace(config.data, leave_out=[])) == registry
    left = choose_sources(registry, replace(config.data, leave_out=[registry[1].name]))
    assert left == [registry[0], *registry[2:]]
    elsewhere = replace(registry[1], recipes=["elsewhere"])
    assert choose_sources([registry[0], elsewhere], replace(config.data, leave_out=[])) == [registry[0]]


def test_a_source_that_is_left_out_must_be_one(registry, config):
    with pytest.raises(ValueError, match=rf"leave_out names \['typo'\], but the sources are: {registry[0].name}"):
        choose_sources(registry, replace(config.data, leave_out=["typo"]))


def test_leaving_out_all_of_stage_1_is_an_error(registry, config):
    names = [source.name for source in registry if source.stage1]
    with pytest.raises(ValueError, match="no source for stage 1; remedy"):
        choose_sources(registry, replace(config.data, leave_out=names))
