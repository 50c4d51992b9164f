"""The command line: what is not itself a notebook. `python -m f2llm <verb>`, also installed as `f2llm`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .checkpoint import clear_finished, require_writable
from .config import load_config, read_yaml, resolve, root, write_config
from .notebook import code_of, execute, write_html
from .plan import check, slurm_script, torchrun_line

app = typer.Typer(help=__doc__.splitlines()[0], no_args_is_help=True, add_completion=False)


@app.command()
def sizes() -> None:
    """The sizes that model.size can name, with their shapes and students."""
    params = read_yaml(root() / "params.yaml")
    for name in params["sizes"]:
        config = resolve(params, name)
        backbone, students = config.backbone, ", ".join(config.prune.students) or "none"
        chosen = "  <- model.size" if name == params["model"]["size"] else ""
        shape = f"{backbone.layers} layers x {backbone.hidden_dim}, MLP {backbone.mlp_dim}, vocabulary {backbone.vocab}"
        print(f"{name}: {shape}; data: {config.data.source}; students: {students}{chosen}")


@app.command()
def config(
    size: Annotated[str, typer.Argument(help="a size, as `sizes` lists them")],
    out: Annotated[Path, typer.Argument(help="where the resolved configuration goes")],
) -> None:
    """Check params.yaml and write the resolved configuration of one size (stage `config`)."""
    write_config(load_config(size), out)


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
    load_config()
    require_writable([Path(name) for name in ("build", "data", "models", "results", "runs")], free_mib=500)
    executed = Path("runs") / f"{notebook}.ipynb"
    execute(Path("notebooks") / f"{notebook}.ipynb", executed)
    clear_finished(Path("scratch/train"))
    if reading_copy:
        reading_copy.parent.mkdir(parents=True, exist_ok=True)
        write_html(executed, reading_copy, with_code=False)


@app.command()
def plan(
    stage: Annotated[str, typer.Argument(help="stage1, stage2 or distill")],
    nodes: Annotated[int, typer.Option(help="machines")] = 1,
    gpus: Annotated[int, typer.Option(help="GPUs, and so processes, of each machine")] = 1,
    slurm: Annotated[bool, typer.Option(help="a script for sbatch instead of a line")] = False,
    hours: Annotated[int, typer.Option(help="time limit of the Slurm job")] = 24,
) -> None:
    """What to type to train a stage on several GPUs and machines: the same result as on one."""
    check(stage, nodes, gpus)
    print(slurm_script(stage, nodes, gpus, hours) if slurm else torchrun_line(stage, nodes, gpus))


@app.command()
def summary(
    seconds: Annotated[int, typer.Option(help="how long the run took; 0: not known")] = 0,
) -> None:
    """The table of results, where the report lies, and how long it took."""
    from .report import summary_lines

    print("\n".join(summary_lines(root(), seconds)))


@app.command()
def readme() -> None:
    """Put the table of results into README.md, between its two markers."""
    from .report import readme_with_results

    path = root() / "README.md"
    path.write_text(readme_with_results(path.read_text(encoding="utf-8"), root()), encoding="utf-8")


def main() -> None:
    """Run a verb; a wrong input ends with one line and exit code 1, not with a traceback."""
    try:
        app()
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
