"""Makes a model folder that can be published: the model, a card, its description for mteb, a complete contract.

Also checks a folder of mteb's results as their repository does, without network.
"""

import hashlib
import json
import math
import re
import shutil
import subprocess
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError
from safetensors import safe_open

from ..config import load_config
from ..contract import Contract, contract_of, read_contract, write_contract
from ..evaluation.library import mteb
from ..model import Embedder
from ..store.files import whole_folder
from ..store.model_folder import read_json
from .card import Facts, card, read_scores
from .doctor import examine

LARGEST_FILE = 10 * 2**20  # bytes, of the results repository
META_PY = '''"""{name} for mteb/models/model_implementations.

The revision is the SHA-1 of the weights. From the hub mteb loads a commit: once the weights are there, its 40 digits
belong here, into model_meta.json and into the name of the folder of results.
"""

from mteb.models import ModelMeta
from mteb.models.instruct_wrapper import InstructSentenceTransformerModel
from mteb.models.model_meta import ScoringFunction

model = {code}
'''


def export(
    folder: Path,
    out: Path,
    name: str,
    licence: str = "apache-2.0",
    base: str | None = None,
    manifest: Path | None = None,
    scores: Path | None = None,
) -> None:
    """Write a copy of a model with README.md, model_meta.json and model_meta.py, as `name` (organisation/model).

    base: the hub's name of the backbone; None: as params.yaml has it for the model's size. manifest: of the training
    data, for its table. scores: a scores.csv, for the model's scores. A contract without embeddings gets them here.
    ValueError if `f2llm doctor` finds a fault: nothing is written.
    """
    folder, out = Path(folder), Path(out)
    _check_places(folder, out, name)
    if faults := [finding for finding in examine(folder) if finding.state == "WRONG"]:
        raise ValueError(f"{folder} is not fit to be published. {faults[0]} (all: f2llm doctor {folder})")
    train = read_json(folder / "train.json") if (folder / "train.json").exists() else {}
    sources = read_json(manifest)["sources"] if manifest else {}
    means = read_scores(scores, _name_in_scores(train, folder)) if scores else []
    with whole_folder(out) as new:
        shutil.copytree(folder, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", "onnx", "adapter"))
        (new / "2_Normalize").mkdir(exist_ok=True)
        contract = complete_contract(new)
        onnx = _write_onnx(new)
        base = base or _declared_base(train)
        facts = Facts(name, licence, base, contract, train, sources, means, _commit(), num_parameters(new), onnx)
        (new / "README.md").write_text(card(facts), encoding="utf-8")
        write_model_meta(new, facts)


def _check_places(folder: Path, out: Path, name: str) -> None:
    """ValueError if the name is none of the hub, or if the export would overwrite what it did not write."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"name is {name!r}, but must be organisation/model; remedy: as in --name my-lab/f2llm-nano")
    if out.resolve() == folder.resolve() or out.resolve() in folder.resolve().parents:
        raise ValueError(f"{out} is the model itself or holds it, and would be replaced; remedy: another folder")
    if out.exists() and any(out.iterdir()) and not (out / "model_meta.json").exists():
        raise ValueError(f"{out} has files that no export wrote, which would be removed; remedy: another folder")


def complete_contract(folder: Path) -> Contract:
    """The folder's contract, with embeddings: they are computed and written where there were none."""
    contract = read_contract(folder)
    if contract is None or contract.computed_in is None:
        model = Embedder.load(folder)
        model.matryoshka_dims = contract.matryoshka_dims if contract else None
        contract = contract_of(folder, model)
        write_contract(folder, contract)
    return contract


def _name_in_scores(train: dict, folder: Path) -> str:
    """What scores.csv calls a model: 'stage2', 'pico-distilled'."""
    stage = train.get("stage", folder.name)
    return f"{stage.removeprefix('distill ')}-distilled" if stage.startswith("distill ") else stage


def _declared_base(train: dict) -> str | None:
    """The backbone of the model's size in params.yaml; None outside a clone, or if the size makes its own."""
    try:
        return load_config(train["size_name"]).backbone.name
    except (KeyError, ValueError):
        return None


def _commit() -> str:
    """The commit of the code, and whether files differ from it; '' where there is no git."""
    command = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*command, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.strip() + (", with changes" if changed else "")


def num_parameters(folder: Path) -> tuple[int, int]:
    """(all, of the embedding table), counted in the headers of the weights."""
    total = embedding = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                count = math.prod(tensors.get_slice(name).get_shape())
                total += count
                embedding += count if name.endswith("embed_tokens.weight") else 0
    return total, embedding


def sha1_of_weights(folder: Path) -> str:
    """40 hexadecimal digits of the weights' files, one after the other in order of their names."""
    digest = hashlib.sha1(usedforsecurity=False)
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            while piece := opened.read(2**24):
                digest.update(piece)
    return digest.hexdigest()


def _write_onnx(folder: Path) -> bool:
    """Whether onnx/ was written, by sentence-transformers' own exporter, which needs the package optimum."""
    if find_spec("optimum") is None:
        return False
    from sentence_transformers import SentenceTransformer

    with TemporaryDirectory() as scratch:
        model = SentenceTransformer(str(folder), backend="onnx", model_kwargs={"export": True}, local_files_only=True)
        model.save_pretrained(scratch)
        shutil.copytree(Path(scratch) / "onnx", folder / "onnx")
    return True


# mteb -------------------------------------------------------------------------------------------


def model_meta(folder: Path, facts: Facts):
    """mteb's ModelMeta of an exported model; its revision is the SHA-1 of the weights.

    Its training datasets are the MTEB tasks whose data the sources overlap with, as data/sources.yaml knows them.
    """
    mteb()
    from mteb.models import ModelMeta
    from mteb.models.instruct_wrapper import InstructSentenceTransformerModel
    from mteb.models.model_meta import ScoringFunction

    contract = facts.contract
    overlaps = {task for entry in facts.sources.values() for task in entry.get("overlap") or []}
    prompts = {"instruction_template": contract.query_prompt, "apply_instruction_to_passages": False}
    values = {
        "loader": InstructSentenceTransformerModel,
        "loader_kwargs": prompts | {"max_seq_length": contract.max_tokens},
        "name": facts.name,
        "revision": sha1_of_weights(folder),
        "release_date": date.today().isoformat(),
        "languages": mteb_languages(facts.languages) or None,
        "n_parameters": facts.parameters[0],
        "n_embedding_parameters": facts.parameters[1],
        "memory_usage_mb": round(sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20, 1),
        "max_tokens": contract.max_tokens,
        "embed_dim": sorted(contract.matryoshka_dims) if contract.matryoshka_dims else contract.dim,
        "license": facts.licence,
        "framework": ["Sentence Transformers", "PyTorch", "safetensors", "Transformers"],
        "reference": f"https://huggingface.co/{facts.name}",
        "similarity_fn_name": ScoringFunction.COSINE,
        "training_datasets": overlaps if facts.sources else None,
        "adapted_from": facts.base,
        **{"open_weights": True, "public_training_code": None, "public_training_data": None, "use_instructions": True},
    }
    try:
        return ModelMeta(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key, value = first["loc"][0], first["input"]
        raise ValueError(f"mteb does not take {key} {value!r}: {first['msg']}; remedy: one that it knows") from None


def mteb_languages(codes: list[str]) -> list[str]:
    """Codes as mteb has them, 'deu-Latn' of 'de', in order, without languages whose usual script it does not know."""
    folder = Path(mteb().__file__).parent / "languages"
    long, scripts = (read_json(folder / f"{name}.json") for name in ("iso_639_1_to_3", "iso_639_3_to_default_script"))
    three = [long.get(code, code) for code in codes]
    return sorted({f"{code}-{scripts[code]}" for code in three if code in scripts})


def write_model_meta(folder: Path, facts: Facts) -> None:
    """model_meta.json, as mteb's folders of results have it, and model_meta.py, as its registry has it."""
    meta = model_meta(folder, facts)
    (folder / "model_meta.json").write_text(json.dumps(meta.to_dict(), indent=2, default=str) + "\n", encoding="utf-8")
    code = META_PY.format(name=facts.name, code=meta.to_python())
    (folder / "model_meta.py").write_text(code, encoding="utf-8")


def check_submission(folder: Path, benchmark: str | None = None) -> list[str]:
    """What mteb's results repository would object to in a folder results/<organisation__model>/<revision>.

    benchmark: its tasks must be there, whole, and on the data that this mteb pins. Not checked, since they need the
    network: that the model can be had, and that scores equal those of the repository within 0.001.
    """
    folder = Path(folder)
    if not (folder / "model_meta.json").exists():
        return [f"{folder} has no model_meta.json; remedy: the folder of results of one revision of a model"]
    problems = _problems_of_meta(folder, mteb())
    results, more = _read_results(folder, mteb())
    problems += more + _problems_of_neighbours(folder, results)
    if not (folder / "run_settings.jsonl").exists():
        problems.append("run_settings.jsonl is missing, which reviewers ask for; remedy: results of a newer mteb")
    return problems + (_missing_of(mteb().get_benchmark(benchmark), results) if benchmark else [])


def _problems_of_meta(folder: Path, library) -> list[str]:
    meta = read_json(folder / "model_meta.json")
    name, revision, problems = meta.get("name") or "", meta.get("revision") or "", []
    if "/" not in name:
        problems.append(f"model_meta.json has the name {name!r}, but must have organisation/model")
    if folder.parent.name != (expected := name.replace("/", "__").replace(" ", "_")):
        problems.append(f"the folder is {folder.parent.name!r}, but the model's name makes it {expected!r}")
    if folder.name != revision:
        problems.append(f"the folder is {folder.name!r}, but model_meta.json has the revision {revision!r}")
    if not re.fullmatch(r"[0-9a-f]{40}|.", revision):
        problems.append(f"the revision is {revision!r}, but must have 40 hexadecimal digits")
    if name not in {known.name for known in library.get_model_metas()}:
        problems.append(f"{name} is not in the registry of this mteb; remedy: a pull request with model_meta.py first")
    return problems


def _read_results(folder: Path, library) -> tuple[dict, list[str]]:
    """{task: its result}, and what is wrong with files."""
    results, problems = {}, []
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        if file.stat().st_size > LARGEST_FILE:
            problems.append(f"{file.name} has {file.stat().st_size / 2**20:.1f} MiB, but at most 10 are taken")
        if file.suffix != ".json" or file.name == "model_meta.json":
            continue
        try:
            result = library.TaskResult.from_disk(file)
        except Exception as error:  # of pydantic, json, or mteb's conversion of old files
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            problems.append(f"{file.name} is no result of mteb ({reason})")
            continue
        results[result.task_name] = result
        if result.task_name != file.stem:
            problems.append(f"{file.name} has the results of {result.task_name}; its name must be that of the task")
        if not result.mteb_version:
            problems.append(f"{file.name} does not say which mteb made it")
    return results, problems + ([] if results else [f"{folder} has no results"])


def _problems_of_neighbours(folder: Path, results: dict) -> list[str]:
    """Tasks that another revision of the same model has results of, too."""
    others = [path for path in sorted(folder.parent.iterdir()) if path.is_dir() and path.name != folder.name]
    return [
        f"{task} has results under revision {other.name} as well; remedy: one revision for each task"
        for other in others
        for task in sorted(results)
        if (other / f"{task}.json").exists()
    ]


def _missing_of(benchmark, results: dict) -> list[str]:
    """Tasks, splits and languages of a benchmark without results, and data of another revision than it pins."""
    problems = []
    for task in benchmark.tasks:
        name, pinned = task.metadata.name, task.metadata.revision
        if name not in results:
            problems.append(f"{benchmark.name}: {name} was not run")
            continue
        if missing := results[name].get_missing_evaluations(task):
            problems.append(f"{benchmark.name}: {name} lacks {str(missing)[:90]}")
        if (found := results[name].dataset_revision) != pinned:
            problems.append(f"{name} was run on data at {found[:8]}, but {benchmark.name} pins {pinned[:8]}")
    return problems
