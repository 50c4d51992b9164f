"""The sizes of params.yaml as a table: the published shapes and trainings, and what they need here."""

from ...config import Config, load_config, read_yaml, root
from ...data.registry import load_registry
from . import plan
from .costs import num_parameters, shape_of
from .plan import fits, frugal, gpus_or_reference, needs, own_parameters, shown, sizes_of, student_of


def published_row(config: Config, base: str | None) -> dict:
    """A size as a row of the papers' tables; for a pruned size its student, whose teacher is the model it is cut from.

    base: the size that a pruned size is cut from.
    """
    student = student_of(config)
    shape, training = shape_of(config, student), config.distill[student] if student else config.stage2
    name = config.teacher.partition("@")[0].rpartition("-")[2]
    row = {"recipe": config.recipe, "size": config.name} | {name: shape[key] for name, key in PAPERS_WORDS.items()}
    row |= {"parameters": num_parameters(**shape)[0], "learning_rate": training.learning_rate}
    row |= {"epochs": training.epochs, "global_batch": training.global_batch_size}
    return row | {"teacher": base if student else "" if config.teacher == "none" else name}


PAPERS_WORDS = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}


def published_rows() -> list[tuple[Config, dict]]:
    """(configuration, row of `published_row`) of every size under every recipe."""
    params = read_yaml(root() / "params.yaml")
    configs = [config for recipe in params["recipes"] for config in sizes_of(params, recipe)]
    return [(config, published_row(config, params["sizes"][config.name].get("base"))) for config in configs]


def published_table() -> list[list]:
    """Only the published values: a heading, and a row per size of the papers and recipe."""
    rows = [row for config, row in published_rows() if config.backbone.architecture == "qwen3"]
    return [list(rows[0]), *(list(row.values()) for row in rows)]


HEADINGS = "recipe size hidden layers MLP heads KV dim parameters non-emb. rate epochs batch teacher"
HEADINGS += " GPU least disk hours"


def table_of_sizes() -> tuple[list[list[str]], str]:
    """(heading and a row per size and recipe, what the columns mean): shapes, trainings, estimates for this machine."""
    chosen, registry = load_config(), load_registry(root() / "data" / "sources.yaml")
    here, table = plan.machine_here(chosen), [[*HEADINGS.split(), ""]]
    for config, row in published_rows():
        gpus = gpus_or_reference(here, config)
        wanted, least = needs(config, registry, gpus), needs(frugal(config), registry, gpus)
        estimates = [f"{number:,.0f}" for number in (wanted.gpu_gib, least.gpu_gib, wanted.disk_gib)]
        estimates.append(f"{wanted.hours:,.0f}" if wanted.hours else "unknown")
        remarks = [] if fits(config, registry, here) else ["not here"]
        remarks += ["<- model.size"] if (config.name, config.recipe) == (chosen.name, chosen.recipe) else []
        parameters = [f"{number / 1e6:,.1f}M" for number in own_parameters(config)]
        shape, training = list(row.values())[:8], list(row.values())[9:]
        table.append([*map(str, [*shape, *parameters, *training, *estimates]), " ".join(remarks)])
    legend = (
        f"non-emb.: parameters without the embedding table. GPU, disk: GiB, and hours of one {gpus[0].name}"
        f"{'' if here.gpus else ' (no GPU is here)'}, by estimate, with machine of params.yaml and without override; "
        "least: of a GPU's memory, by machine.recompute: full and machine.activation_tokens as machine.token_budget; "
        "a pruned size counts the training of what it is cut from, too.\n"
        f"This machine: {shown(here)}; not here: cannot be trained on it."
    )
    return table, legend
