"""Parameters: YAML that is read in two ways, values that cannot be right, and things named that are not there."""

import json
import shutil
from contextlib import chdir
from functools import cache
from pathlib import Path

from registry import reads, refused

from f2llm.config import overrides_of, read_yaml, resolve
from f2llm.pipeline.inputs import require_inputs

ROOT = Path(__file__).parents[2]


@cache
def params() -> str:
    return (ROOT / "params.yaml").read_text(encoding="utf-8")


def resolving(path: Path, content: str | bytes):
    """The configuration of a params.yaml with this content."""
    path = path / "params.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return lambda: resolve(read_yaml(path))


def overriding(path: Path, override: str):
    return resolving(path, params().replace("override: {}", f"override: {{{override}}}"))


def value_of(path: Path, override: str, section: str, key: str):
    return lambda: getattr(getattr(overriding(path, override)(), section), key)


# YAML -------------------------------------------------------------------------------------------


@refused("line 207, column 1: the key 'seed' stands twice")
def a_key_that_stands_twice(tmp_path):
    lines = params().rstrip().splitlines()[:205]
    return resolving(tmp_path, "\n".join([*lines, *[""] * (206 - len(lines)), "seed: 1"]))


@refused("the key 'epochs' stands twice", "stage1: {epochs: 1, epochs: 3}", "stage1: {epochs: 1, 'epochs': 1}")
def a_key_that_stands_twice_in_a_table(tmp_path, override):
    return overriding(tmp_path, override)


@refused("a merge key .* writes out as copies")
def a_merge_key(tmp_path):
    return overriding(tmp_path, "stage1: &common {epochs: 3}, stage2: {<<: *common, max_steps: 5}")


@refused(r"params.yaml is not valid YAML: line 10, column 1: found character that cannot start any token")
def a_tab(tmp_path):
    return resolving(tmp_path, params().replace("  size: nano", "\tsize: nano"))


@refused(r"byte \d+ is not UTF-8", "latin-1", "utf-16")
def another_encoding(tmp_path, encoding):
    text = params().replace("learning_rate: 3.0e-3", "learning_rate: 3.0e-3 # \xe4")
    return resolving(tmp_path, text.encode(encoding, "ignore"))


@refused("could not determine a constructor for the tag")
def a_tag_that_runs_code(tmp_path):
    return resolving(tmp_path, params().replace("seed: 0", "seed: !!python/object/apply:os.getpid []"))


@refused("tables within tables deeper than 20", 30, 400, 4_000)
def deep_tables(tmp_path, depth):
    return overriding(tmp_path, "stage1: " + "{a: " * depth + "1" + "}" * depth)


@refused("opens more than 10000 brackets")
def endless_brackets(tmp_path):
    return resolving(tmp_path, f"{params()}\nmore: {'[' * 100_000}")


@refused("found another document|control characters are not allowed", "\n---\nseed: 1\n", "\nx: \0\n")
def what_is_no_single_document(tmp_path, more):
    return resolving(tmp_path, params() + more)


@refused("but must be a table of keys and values", "", "- a\n", "nano\n", "42\n")
def no_table(tmp_path, content):
    return resolving(tmp_path, content)


@refused("params.yaml cannot be read: Is a directory")
def a_folder(tmp_path):
    (tmp_path / "params.yaml").mkdir()
    return lambda: read_yaml(tmp_path / "params.yaml")


@reads(10)
def a_leading_zero_as_dvc_reads_it(tmp_path):
    return value_of(tmp_path, "stage1: {epochs: 010}", "stage1", "epochs")


@reads(0.001, "1e-3", "1E-3", "+1e-3", ".001", "0.001")
def a_small_number(tmp_path, spelling):
    return value_of(tmp_path, f"stage1: {{learning_rate: {spelling}}}", "stage1", "learning_rate")


@reads("2026-01-01")
def a_date_as_a_name(tmp_path):
    return value_of(tmp_path, "data: {split: 2026-01-01}", "data", "split")


@reads("nano", b"\xef\xbb\xbf", b"")
def another_editor(tmp_path, start):
    return lambda: resolving(tmp_path, start + params().replace("\n", "\r\n").encode())().name


# Values -----------------------------------------------------------------------------------------


@refused("machine.compile is '(no|yes|on|off)' .* but must be of type bool", "no", "yes", "on", "off")
def booleans_of_old_yaml(tmp_path, word):
    return overriding(tmp_path, f"machine: {{compile: {word}}}")


@refused("stage1.max_steps is .* but must be of type int", "1_000", "1:30", "0x10", "0o10", "'5'", "2.0", "true", "~")
def what_is_no_whole_number(tmp_path, value):
    return overriding(tmp_path, f"stage1: {{max_steps: {value}}}")


@refused("stage1.learning_rate is inf, but must be a finite number", ".inf", "1e400", "1" + "0" * 400 + ".0")
def an_endless_rate(tmp_path, value):
    return overriding(tmp_path, f"stage1: {{learning_rate: {value}}}")


@refused("is nan, but must be", "learning_rate", "document_instruction_share", "temperature")
def not_a_number(tmp_path, key):
    return overriding(tmp_path, f"stage1: {{{key}: .nan}}")


@refused("but must be (above 0|0 or more|2 or more|below)", "max_tokens: -1", "epochs: -1", "global_batch_size: -8")
def a_negative_number(tmp_path, value):
    return overriding(tmp_path, f"stage1: {{{value}}}")


@refused("seed is .*, but must be (below 9223372036854775808|0 or more|of type int)", "1" + "0" * 30, "-1", "0.5")
def an_impossible_seed(tmp_path, seed):
    return resolving(tmp_path, params().replace("seed: 0\n", f"seed: {seed}\n"))


@refused("unknown key 'temprature'; did you mean 'temperature'")
def a_misspelt_key(tmp_path):
    return overriding(tmp_path, "stage1: {temprature: 0.1}")


@refused("unknown key '(null|1|true)'|unknown key 'True'", "~", "1", "true")
def a_key_that_is_no_text(tmp_path, key):
    return overriding(tmp_path, f"stage1: {{{key}: 2}}")


@refused("stage1 is .* but must be a table", "[1]", "5", "text", "~")
def a_section_that_is_no_table(tmp_path, value):
    return overriding(tmp_path, f"stage1: {value}")


@refused("model.size is .* did you mean", "0.6", "Nano", "0.6b", "[nano]", "0.6B ''")
def a_size_that_is_nearly_one(tmp_path, size):
    size = size if " " not in size else "'0.6B '"
    return resolving(tmp_path, params().replace("size: nano", f"size: {size}"))


@refused("recipe is 'nano', but params.yaml offers only: v2, v1")
def a_size_as_recipe(tmp_path):
    return resolving(tmp_path, params().replace("recipe: v2  ", "recipe: nano  "))


@refused("model.size is 'v2'")
def a_recipe_as_size(tmp_path):
    return resolving(tmp_path, params().replace("size: nano", "size: v2"))


@refused("override has (recipe|name), which chooses presets", "recipe: v1", "name: 0.6B")
def a_preset_chosen_by_override(tmp_path, override):
    return overriding(tmp_path, override)


@refused("sizes.330M.base is '330M', but params.yaml offers only")
def a_size_that_starts_from_itself(tmp_path):
    text = params().replace("330M: {base: 0.6B,", "330M: {base: 330M,").replace("size: nano", "size: 330M")
    return resolving(tmp_path, text)


@refused("prune.students has '.*', but a name is a folder's", "'../x'", "a/b", "'.'", "'two words'")
def a_student_outside_its_folder(tmp_path, name):
    shape = "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1}"
    return overriding(tmp_path, f"prune: {{students: {{{name}: {shape}}}}}")


@refused("prune.leave_out has 'nano', but the students are: pico, femto, atto")
def a_student_left_out_that_is_none(tmp_path):
    return overriding(tmp_path, "prune: {leave_out: [nano]}")


@refused("evaluate.only has 'stage3', but the models are: .*did you mean 'stage2'")
def a_model_to_evaluate_that_is_none(tmp_path):
    return overriding(tmp_path, "evaluate: {only: [stage2, stage3]}")


@refused("evaluate.only has 'pico-distilled'")
def a_student_to_evaluate_that_is_left_out(tmp_path):
    return overriding(tmp_path, "prune: {leave_out: [pico]}, evaluate: {only: [pico-distilled]}")


@refused("is not of the form section.key=value", "data.from", "=released", "data..from=x", "data.=x")
def a_setting_without_its_parts(tmp_path, setting):
    return lambda: overrides_of([setting])


@refused(r"the value is not valid YAML: line \d", "data.only=[squad", "data.only={a: 1, a: 2}")
def a_setting_that_is_no_yaml(tmp_path, setting):
    return lambda: overrides_of([setting])


# What is named and is not there -------------------------------------------------------------------


def starting(tmp_path: Path, override: str, size: str = "nano", entry: str = ""):
    """What stage `config` does in a folder with the repository's dvc.yaml and registry, or another one, and params."""
    (tmp_path / "data" / "local").mkdir(parents=True)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    if entry:
        (tmp_path / "data" / "sources.yaml").write_text(f"sources:\n{entry}")
    else:
        shutil.copy(ROOT / "data" / "sources.yaml", tmp_path / "data")
    (tmp_path / "params.yaml").write_text(params().replace("override: {}", f"override: {{{override}}}"))

    def start():
        with chdir(tmp_path):
            require_inputs(resolve(read_yaml(Path("params.yaml")), size))
        return "nothing is missing"

    return start


MINE = """  - {name: mine, recipes: [local], task: retrieval, files: [mine.jsonl], licence: unknown,
     instruction: "Find it.", symmetric: false}
"""


@refused("data.only names 'sqad'.*did you mean 'squad'|data.only names 'squad', which is none", "sqad", "squad")
def a_source_of_another_mixture(tmp_path, name):
    data_from = "released" if name == "sqad" else "embedded"
    return starting(tmp_path, f"data: {{from: {data_from}, only: [{name}]}}")


@refused("no source has recipe 'local'; remedy: add one")
def local_data_without_an_entry(tmp_path):
    return starting(tmp_path, "data: {from: local}")


@refused("source 'mine': data/local/mine.jsonl missing; did you mean 'mines.jsonl'")
def a_local_file_under_another_name(tmp_path):
    start = starting(tmp_path, "data: {from: local}", entry=MINE)
    (tmp_path / "data" / "local" / "mines.jsonl").write_text("{}\n")
    return start


@refused("source 'mine': data/local/../sources.yaml lies outside")
def a_local_file_from_elsewhere(tmp_path):
    return starting(tmp_path, "data: {from: local}", entry=MINE.replace("mine.jsonl", "../sources.yaml"))


@reads("nothing is missing")
def a_local_file_that_is_there(tmp_path):
    start = starting(tmp_path, "data: {from: local}", entry=MINE)
    (tmp_path / "data" / "local" / "mine.jsonl").write_text("{}\n")
    return start


@refused("mine.miner is 'embedder:models/mine', but there is no folder models/mine")
def a_miner_that_is_not_there(tmp_path):
    return starting(tmp_path, 'mine: {miner: "embedder:models/mine"}')


@refused("neither a folder nor a model in the hub's cache")
def a_miner_of_the_hub_that_is_not_there(tmp_path):
    return starting(tmp_path, 'mine: {miner: "sentence-transformers:nobody/no-model"}')


@reads("nothing is missing", "embedder:models/stage1", "embedder:./models/distilled/pico", "tfidf")
def a_miner_that_a_stage_makes(tmp_path, miner):
    return starting(tmp_path, f'mine: {{miner: "{miner}"}}')


@refused("teacher is 'folder:models/mine', but models/mine holds no config.json")
def a_teacher_that_is_not_there(tmp_path):
    return starting(tmp_path, 'teacher: "folder:models/mine", stage2: {distillation_weight: 1.0}')


@refused("mirror .*, Qwen/Qwen3-0.6B: config.json is missing.*remedy: fetch with: f2llm fetch 0.6B --recipe v2")
def a_backbone_in_no_mirror(tmp_path):
    return starting(tmp_path, "data: {from: embedded}, teacher: none, stage2: {distillation_weight: 0.0}", "0.6B")


@refused("holds Qwen/Qwen3-0.6B at revision 0000")
def a_backbone_of_another_commit(tmp_path):
    start = starting(tmp_path, "data: {from: embedded}, teacher: none, stage2: {distillation_weight: 0.0}", "0.6B")
    (tmp_path / "mirror").mkdir()
    entry = {"revision": "0" * 40, "files": {}}
    (tmp_path / "mirror" / "manifest.json").write_text(json.dumps({"Qwen/Qwen3-0.6B": entry}))
    return start


@refused("mirror .*, codefuse-ai/F2LLM-v2: paracrawl_.* is missing.*remedy: fetch with: f2llm fetch --set data.from")
def released_data_in_no_mirror(tmp_path):
    return starting(tmp_path, "data: {from: released, only: [squad, paracrawl], revision: null}")
