"""The results of all benchmarks as one table in benchmarks/README.md, between its two marks.

python -m benchmarks.table
"""

import json
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT
from f2llm.reporting.readme import write_between

MARKS = ("<!-- benchmarks: written by `make bench` -->", "<!-- end of benchmarks -->")
NAMES = (
    "training_cpu",
    "encode_cpu",
    "memory_cpu",
    "distillation_cpu",
    "sharding_cpu",
    "prune_cpu",
    "data_cpu",
    "evaluation_cpu",
    "lora_cpu",
    "plan_cpu",
    "gpu",
)


def lines(folder: Path = RESULTS) -> list[str]:
    """The table in Markdown; a benchmark without a result file appears as not run."""
    table = ["| benchmark | ratio | against | min | median | max | goal |", "|---|---|---|---|---|---|---|"]
    measured: dict[str, list[str]] = {}  # by machine
    for name in NAMES:
        path = Path(folder) / f"{name}.json"
        if not path.exists():
            kind = "not run on a GPU" if name == "gpu" else "not run"
            table.append(f"| {name} | {kind} | | | | | |")
            continue
        result = json.loads(path.read_text())
        machine = result["hardware"]
        where = machine.get("gpu") or f"{machine['cpu']}, one thread"
        measured.setdefault(where, []).append(f"{name} {result['date']}")
        for ratio, found in result["ratios"].items():
            goal = _goal(found)
            padding = f"; {found['padding']:.0%} padding" if found.get("padding") else ""
            figures = " | ".join(
                f"{found[key]:,.{0 if found[key] >= 1000 else 2}f}" for key in ("min", "median", "max")
            )
            table.append(f"| {name} | `{ratio}` | {found['against']}{padding} | {figures} | {goal} |")
    for where, names in measured.items():
        table += ["", f"Measured: {', '.join(names)}; {where}."]
    return table


def _goal(found: dict) -> str:
    """The goal, followed by "missed" if it was; with `at_most`, lower figures are better."""
    if found["goal"] is None:
        return ""
    missed = found["median"] > found["goal"] if found.get("at_most") else found["median"] < found["goal"]
    return f"{'at most ' * found.get('at_most', False)}{found['goal']}{' missed' * missed}"


def main() -> None:
    """Rewrite the table of benchmarks/README.md."""
    write_between(ROOT / "benchmarks" / "README.md", MARKS, "\n".join(lines()))


if __name__ == "__main__":
    main()
