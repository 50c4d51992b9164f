"""LoRA and DoRA, by peft: the model's weights stay as they are, a low-rank matrix beside each linear layer is trained.

An adapter folder is peft's own, adapter_config.json and adapter_model.safetensors, and has base.json beside them: which
model it belongs to, by the hashes of its weights, and the settings of training that decide an embedding.

There is no dropout: gradient caching embeds a text twice and needs the same embedding both times.
Deviation: the papers train all weights, as every size does here unless `lora.rank` is above 0.
Source: Hu et al. 2021, arXiv 2106.09685; DoRA: Liu et al. 2024, arXiv 2402.09353.
"""

import json
from pathlib import Path
from typing import Literal

import torch
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from pydantic import PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from .config import Lora, PositiveFloat
from .model import Embedder
from .store.checked import build, checked
from .store.files import sha256
from .store.model_folder import LINEAR, read_json

PREFIX = "base_model.model."  # of every weight in peft's files
NO_EFFECT = {"base_model_name_or_path", "revision", "task_type", "peft_version", "inference_mode", "auto_mapping"}
NO_EFFECT |= {"lora_dropout", "megatron_core", "layers_pattern"}  # on a merged model


@checked
class AdapterConfig:
    """What `merge` reads of peft's adapter_config.json; it takes no adapter in which anything else is set."""

    peft_type: Literal["LORA"]
    r: PositiveInt
    lora_alpha: PositiveFloat
    use_dora: bool
    use_rslora: bool
    init_lora_weights: bool  # others, such as PiSSA, change the base
    target_modules: list[str]


@checked
class Base:
    """base.json: sha256 of each of the base's weight files, and what decides an embedding beside the weights."""

    path: str
    sha256: dict[str, str]
    max_tokens: PositiveInt
    query_prompt: str
    matryoshka_dims: list[int] | None


def add_adapter(model: PreTrainedModel, lora: Lora, seed: int) -> None:
    """Put a new adapter, which changes nothing yet, into a model, in place; from now on only it has gradients."""
    targets = sorted(LINEAR if lora.targets == "all" else lora.targets)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, use_dora=lora.dora, target_modules=targets)
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def has_adapter(model: PreTrainedModel) -> bool:
    return hasattr(model, "peft_config")


def num_trained(model: PreTrainedModel) -> tuple[int, int]:
    """(parameters that training changes, all parameters)."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, trained in counts if trained), sum(count for count, _ in counts)


def save_adapter(folder: Path, model: Embedder, weights: dict[str, Tensor], base: Path) -> None:
    """Write the adapter of a model to a new folder. weights: by names of its parameters; base: the folder it adapts."""
    folder.mkdir()
    config = model.model.peft_config["default"]
    plain = get_peft_model_state_dict(model.model, state_dict=weights, save_embedding_layers=False)
    plain = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in sorted(plain.items())}
    save_file(plain, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    values = config.to_dict() | {"base_model_name_or_path": str(base), "inference_mode": True}
    of_base = {"path": str(base), "sha256": _hashes(base), "max_tokens": model.max_tokens}
    of_base |= {"query_prompt": model.query_prompt, "matryoshka_dims": model.matryoshka_dims}
    for name, content in (("adapter_config.json", values), ("base.json", of_base)):
        text = json.dumps(content, indent=1, sort_keys=True, default=sorted)  # sets, whose order differs between runs
        (folder / name).write_text(text + "\n", encoding="utf-8")


def merge_weights(model: PreTrainedModel, adapter: Path) -> None:
    """Add the adapter of a folder to the weights of its base, in place; ValueError if they do not belong together."""
    config, path = _read_config(adapter), adapter / "adapter_model.safetensors"
    if not path.exists():
        raise ValueError(f"{path} is missing; remedy: the whole adapter, its weights saved as safetensors")
    try:
        weights = load_file(path)
        of_head = f"{PREFIX}model."  # where the base had a language-model head
        weights = {PREFIX + name.removeprefix(of_head).removeprefix(PREFIX): value for name, value in weights.items()}
        if ranks := {len(value) for name, value in weights.items() if name.endswith("lora_A.weight")} - {config.r}:
            raise ValueError(f"r is {config.r}, but its weights are of rank {min(ranks)}")
        adapted = get_peft_model(model, config)
        report = set_peft_model_state_dict(adapted, weights)
        missing = [name for name in report.missing_keys if ".lora_" in name]
        if wrong := report.unexpected_keys or missing:
            raise ValueError(f"{wrong[0]} is {'left over' if report.unexpected_keys else 'missing'}")
        adapted.merge_and_unload(safe_merge=True)
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{adapter} does not fit its base: {reason}; remedy: the model that it was trained on"
        ) from None


def merge(adapter: Path, base: Path) -> Embedder:
    """The model of a base's folder and an adapter's, float32, on the CPU, whose memory holds the largest model.

    ValueError if the adapter was trained on another base.
    """
    declared = _read_base(adapter)
    if declared and declared.sha256 != _hashes(base):
        raise ValueError(
            f"{adapter} was trained on {declared.path}, but the weights of {base} are others; remedy: that model as it "
            "was then"
        )
    if not declared:
        _check_name(adapter, base)
    model = Embedder.load(base, training=True, precision="float32", device=torch.device("cpu"))
    merge_weights(model.model, adapter)
    model.model.eval()
    if declared:
        model.max_tokens, model.query_prompt = declared.max_tokens, declared.query_prompt
        model.matryoshka_dims = declared.matryoshka_dims
    return model


def _hashes(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}


def _read_base(adapter: Path) -> Base | None:
    """base.json, which an adapter of another tool does not have."""
    path = adapter / "base.json"
    return build(Base, read_json(path), str(path)) if path.exists() else None


def _check_name(adapter: Path, base: Path) -> None:
    """ValueError unless the folder is called what the adapter calls its base: nothing else says which model it was."""
    name = read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or ""
    if Path(name).name != base.resolve().name:
        raise ValueError(
            f"{adapter}/adapter_config.json names the base {name!r}, but {base} has another name; remedy: that model, "
            "in a folder of that name"
        )


def _read_config(adapter: Path) -> LoraConfig:
    path = adapter / "adapter_config.json"
    if not path.exists():
        raise ValueError(f"{path} is missing, so {adapter} is no adapter; remedy: the folder that peft saved")
    values, defaults = read_json(path), LoraConfig().to_dict()
    read = list(AdapterConfig.__pydantic_fields__)
    for key, value in values.items():
        if key not in read and key not in NO_EFFECT and (value or None) != (defaults.get(key) or None):
            raise ValueError(
                f"{path} has {key} {value!r}, with which the kit merges no adapter; remedy: merge it by peft "
                "(merge_and_unload) and save the model"
            )
    config = build(AdapterConfig, {key: (defaults | values)[key] for key in read}, str(path))
    options = {"use_dora": config.use_dora, "use_rslora": config.use_rslora, "target_modules": config.target_modules}
    return LoraConfig(r=config.r, lora_alpha=config.lora_alpha, **options)
