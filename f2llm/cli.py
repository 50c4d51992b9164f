"""The command line: what is not itself a notebook. `python -m f2llm <verb>`, also installed as `f2llm`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .checkpoint import clear_finished, require_writable
from .config import load_config, overrides_of, read_yaml, resolve, root, write_config
from .notebook import code_of, execute, write_html
from .plan import require_valid, slurm_script, torchrun_line

TRAINING_NOTEBOOKS = (
    "01_backbone",
    "02_data",
    "04_stage1",
    "05_stage2",
    "07_distill",
)  # what a machine may be too small for

app = typer.Typer(help=__doc__.splitlines()[0], no_args_is_help=True, add_completion=False)


@app.command()
def sizes(
    csv: Annotated[bool, typer.Option("--csv", help="the published values alone, as CSV")] = False,
) -> None:
    """The sizes that model.size can name, under both recipes: shape, training, and by estimate what they need."""
    from . import needs
    from .registry import load_registry

    chosen, params = load_config(), read_yaml(root() / "params.yaml")
    configs = [config for recipe in params["recipes"] for config in needs.sizes_of(params, recipe)]
    rows = [needs.published_row(config, params["sizes"][config.name].get("base")) for config in configs]
    if csv:
        print("\n".join(",".join(map(str, line)) for line in (rows[0], *(row.values() for row in rows))))
        return
    here, registry = needs.machine_here(chosen), load_registry(root() / "data" / "sources.yaml")
    headings = (
        "recipe size hidden layers MLP heads KV dim parameters body rate epochs batch teacher GPU least disk hours"
    )
    table = [[*headings.split(), ""]]
    for config, row in zip(configs, rows, strict=True):
        gpus = needs.gpus_or_reference(here, config)
        wanted, here_too = needs.needs(config, registry, gpus), needs.fits(config, registry, here)
        least = needs.needs(needs.frugal(config), registry, gpus)
        hours = f"{wanted.hours:,.0f}" if wanted.hours else "unknown"
        remarks = [] if here_too else ["not here"]
        remarks += ["<- model.size"] if (config.name, config.recipe) == (chosen.name, chosen.recipe) else []
        shape, training = list(row.values())[:8], list(row.values())[9:]
        parameters = [f"{number / 1e6:,.1f}M" for number in needs.own_parameters(config)]
        estimates = [f"{number:,.0f}" for number in (wanted.gpu_gib, least.gpu_gib, wanted.disk_gib)] + [hours]
        table.append([*shape, *parameters, *training, *estimates, " ".join(remarks)])
    widths = [max(len(str(cell)) for cell in column) for column in zip(*table)]
    for line in table:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(line, widths)).rstrip())
    print(
        "body: without embeddings. GPU, disk: GiB, and hours of one "
        f"{gpus[0].name}{'' if here.gpus else ' (no GPU is here)'}, by estimate, with machine of params.yaml and "
        "without override; least: of a GPU's memory, by machine.recompute: full and machine.activation_tokens as "
        "machine.token_budget; a pruned size counts the training of what it is cut from, too.\n"
        f"This machine: {needs.shown(here)}; not here: cannot be trained on it."
    )


@app.command()
def config(
    size: Annotated[str, typer.Argument(help="a size, as `sizes` lists them")],
    out: Annotated[Path, typer.Argument(help="where the resolved configuration goes")],
) -> None:
    """Check params.yaml and write the resolved configuration of one size (stage `config`)."""
    write_config(load_config(size), out)


@app.command()
def teacher(
    out: Annotated[Path, typer.Argument(help="where the model goes")],
) -> None:
    """Bring the larger model that stage 2 learns from, if the configuration names one (stage `teacher`)."""
    from .needs import require_fits
    from .teacher import bring_teacher

    config = load_config()
    require_fits(config)
    bring_teacher(config, out)


@app.command()
def code(
    notebook: Annotated[Path, typer.Argument(help="a notebook")],
    out: Annotated[Path, typer.Argument(help="where its code goes")],
) -> None:
    """Write a notebook's code without prose and outputs: what its stage depends on (stage `code`)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(code_of(notebook), encoding="utf-8")


@app.command()
def run(
    notebook: Annotated[str, typer.Argument(help="the name of a notebook, such as 05_stage2")],
    reading_copy: Annotated[Path | None, typer.Option(help="also an HTML without code")] = None,
) -> None:
    """Run a notebook by papermill into runs/, with an HTML copy (every other stage)."""
    from .needs import require_fits

    config = load_config()
    if notebook in TRAINING_NOTEBOOKS:
        require_fits(config)
    require_writable([Path(name) for name in ("build", "data", "models", "results", "runs")], free_mib=500)
    executed = Path("runs") / f"{notebook}.ipynb"
    execute(Path("notebooks") / f"{notebook}.ipynb", executed)
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
) -> None:
    """Bring all published data and models that a size starts from into its mirror folder; repeated, it goes on.

    The models alone: --set data.from=embedded
    """
    from . import hub
    from .mirror import Mirror
    from .registry import choose_sources, load_registry
    from .sources import files_needed

    params = read_yaml(root() / "params.yaml")
    config = resolve(params | ({"recipe": recipe} if recipe else {}), size, overrides_of(settings))
    mirror = root() / config.data.mirror
    if verify:
        problems = Mirror(mirror).verify()
        print("\n".join(problems) or f"{mirror}: all files that were fetched are there, unchanged")
        raise typer.Exit(bool(problems))
    if adopt and config.data.revision is None:
        raise ValueError(
            f"data.revision is null, but --adopt must know the commit of {config.data.released} that {adopt} holds; "
            "remedy: --set data.revision=<40 digits>"
        )
    if adopt:
        hub.adopt(mirror, config.data.released, adopt, config.data.revision)
    needed = files_needed(choose_sources(load_registry(), config.data, config.recipe)[0], config.data)
    if not needed:
        print(f"data.from is {config.data.source}: no data to fetch; the papers' tuples: --set data.from=released")
    plans = hub.plan_all(([] if adopt else needed) + hub.models_needed(config))
    for plan in plans:
        print(f"{plan.repo_id} at {plan.revision}: {len(plan.files)} files, {plan.bytes / 2**30:.2f} GiB")
    for plan in plans:
        hub.fetch(plan, mirror)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="JSON Lines, CSV, TSV or Parquet with query, and passage or label")],
    task: Annotated[str | None, typer.Option(help="retrieval, clustering or classification; or by its columns")] = None,
    instruction: Annotated[str | None, typer.Option(help="what is put before its queries")] = None,
    model: Annotated[Path | None, typer.Option(help="whose tokens are counted")] = None,
) -> None:
    """Look at a file of training data as the pipeline will: exit code 0 if it is usable, 1 with all problems listed."""
    from .check import check_file

    report = check_file(file, load_config().stage2.max_tokens, task=task, instruction=instruction, model=model)
    print(report)
    raise typer.Exit(not report.usable)


@app.command()
def plan(
    stage: Annotated[str, typer.Argument(help="stage1, stage2 or distill")],
    nodes: Annotated[int, typer.Option(help="machines")] = 1,
    gpus: Annotated[int, typer.Option(help="GPUs, and so processes, of each machine")] = 1,
    slurm: Annotated[bool, typer.Option(help="a script for sbatch instead of a line")] = False,
    hours: Annotated[int, typer.Option(help="time limit of the Slurm job")] = 24,
) -> None:
    """What to type to train a stage on several GPUs and machines: the same result as on one."""
    require_valid(stage, nodes, gpus)
    print(slurm_script(stage, nodes, gpus, hours) if slurm else torchrun_line(stage, nodes, gpus))


@app.command()
def ablate(
    jobs: Annotated[int, typer.Option(help="experiments at a time; one per GPU box, one per two CPU cores")] = 1,
    only: Annotated[str, typer.Option(help="a part of the name of an experiment or an arm")] = "",
    collect: Annotated[bool, typer.Option(help="run nothing, only add what this clone has run")] = False,
) -> None:
    """Run what is missing of ablations.yaml from DVC's queue, into results/ablations.csv; killed, it goes on."""
    import pandas as pd

    from . import ablations

    os.chdir(root())
    path = ablations.RESULTS
    earlier = ablations.read_ablations(path) if path.exists() else pd.DataFrame(columns=ablations.COLUMNS)
    failure = None
    try:
        if not collect:
            ablations.run_missing(jobs, earlier, only)
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
    """The table of results, where the report lies, and how long it took."""
    from .report import summary_lines

    print("\n".join(summary_lines(root(), seconds)))


@app.command()
def readme() -> None:
    """Put the tables of results into README.md, and the registry's into data/README.md, between their marks."""
    from .ablations import compare, experiments, first_arms, read_ablations
    from .registry import MARKS, load_registry, registry_markdown
    from .report import ABLATION_MARKS, ablations_markdown, put_between, readme_with_results

    path, of_data = root() / "README.md", root() / "data" / "README.md"
    text = readme_with_results(path.read_text(encoding="utf-8"), root())
    ablated = read_ablations(root() / "results" / "ablations.csv")
    compared = compare(ablated[ablated["group"] != "family"], first_arms(experiments(root() / "ablations.yaml")))
    path.write_text(put_between(text, ABLATION_MARKS, ablations_markdown(compared)), encoding="utf-8")
    tables = registry_markdown(load_registry(root() / "data" / "sources.yaml"))
    of_data.write_text(put_between(of_data.read_text(encoding="utf-8"), MARKS, tables), encoding="utf-8")


def main() -> None:
    """Run a verb; a wrong input ends with one line and exit code 1, not with a traceback."""
    try:
        app()
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)
