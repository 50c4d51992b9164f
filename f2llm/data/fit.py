"""What a recipe will make of a local file: rows held out, hard negatives, batches (`f2llm check`)."""

from types import SimpleNamespace

from ..config import Config
from .held_out import hold_out
from .inspect import Report


def fit(report: Report, config: Config) -> list[str]:
    """Lines about a usable file as a source of its own, by the resolved parameters of a size.

    Remedies are named where a row, a negative or a part of a batch would be missing.
    """
    task, labelled = report.task, "label" in report.columns and "passage" not in report.columns
    source = SimpleNamespace(name=report.path.stem, task=task, instruction="")
    part = SimpleNamespace(name=source.name, source=source, ready_made=not labelled)
    local = SimpleNamespace(source="local", held_out_percent=config.data.held_out_percent, split=config.data.split)
    (held_out,) = hold_out([part], lambda _: report.records(), local).values()
    stages = {"stage1": config.stage1, "stage2": config.stage2}
    drawn = max(getattr(stage.hard_negatives, task) for stage in stages.values() if stage.epochs)
    lines = [f"as a source of size {config.name} by recipe {config.recipe}, as params.yaml has it:"]
    lines.append(f"  held out for evaluation: {held_out.note}")
    lines += [f"  hard negatives: {line}" for line in _negatives(report, config, drawn, labelled)]
    left, batch = report.num_rows - len(held_out.queries), config.stage2.global_batch_size
    if left < batch:
        lines.append(
            f"  batches: about {left:,} rows are left, fewer than the {batch} of a batch, so its queries have fewer "
            f"in-batch negatives; remedy: more rows, or override.training.global_batch_size={max(2, left // 2)}"
        )
    return lines


def _negatives(report: Report, config: Config, drawn: int, labelled: bool) -> list[str]:
    """Where the hard negatives of a step come from, and how many rows lack some."""
    if labelled and report.task == "classification":
        return ["the other label"]
    if labelled:
        return [f"{config.data.negatives} texts of other labels for each row, of which a step draws {drawn}"]
    counts = report.rows_by_negatives
    short = sum(rows for num, rows in counts.items() if num < drawn)
    if not short:
        return [f"given; a step draws {drawn} of them"]
    even = len(counts) == 1 and 0 not in counts
    if report.task == "retrieval" and not even:
        return [
            f"{short:,} rows have fewer than the {drawn} that a step draws; stage mine adds those that are missing "
            f"(mine.miner {config.mine.miner})"
        ]
    if report.task == "retrieval":
        return [f"every row has {min(counts)}, so a step draws {min(counts)} instead of {drawn}"]
    return [
        f"{short:,} rows have fewer than the {drawn} that a step draws, and will be left out; remedy: more negatives "
        f"in the file, or override.training.hard_negatives.{report.task}={max(1, min(counts))}"
    ]
