"""The mean of several models' weights as one model: those of several seeds, rates, or last steps of one backbone."""

from pathlib import Path

import torch

from ..contract import FILE, read_contract
from ..model import Embedder, load_weights
from ..store.files import sha256, whole_folder
from ..store.model_folder import check_model_folder, read_json
from .examined import declared_prompts

SHAPE_ASIDE = ("_name_or_path", "dtype", "torch_dtype", "transformers_version")  # of config.json, no matter of shape


def average(folders: list[Path], out: Path) -> None:
    """Write the mean of the weights of two or more models, in float32; all else is as in the first one's folder.

    ValueError if they are fewer, or differ in shape or tokenizer. Source: Wortsman et al. 2022, arXiv 2203.05482.
    """
    if len(folders) < 2:
        raise ValueError(f"{len(folders)} model to average; remedy: name two or more")
    for folder in folders:
        check_model_folder(folder)
    first, *others = folders
    for other in others:
        _require_alike(first, other)
    model = Embedder.load(first, training=True)
    weights = model.model.state_dict()
    for count, other in enumerate(others, start=2):
        theirs = load_weights(other, torch.float32).state_dict()
        for name, weight in weights.items():
            weight.lerp_(theirs[name].to(weight.device), 1 / count)
    model.query_prompt = declared_prompts(first).get("query", "")
    if (first / FILE).exists():
        model.matryoshka_dims = read_contract(first).matryoshka_dims
    with whole_folder(out) as folder:
        model.write(folder)


def _require_alike(first: Path, other: Path) -> None:
    """ValueError for the first thing in which two models differ that are to be averaged."""
    one, two = (
        {key: value for key, value in read_json(folder / "config.json").items() if key not in SHAPE_ASIDE}
        for folder in (first, other)
    )
    for key in sorted(one.keys() | two.keys()):
        if one.get(key) != two.get(key):
            raise ValueError(
                f"{other} has {key} {two.get(key)} in config.json, {first} has {one.get(key)}; "
                "remedy: models of the same shape, trained from the same backbone"
            )
    if sha256(first / "tokenizer.json") != sha256(other / "tokenizer.json"):
        raise ValueError(f"{other} has another tokenizer.json than {first}; remedy: models of the same backbone")
