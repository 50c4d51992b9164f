"""Structured pruning along hidden size, MLP width and depth; attention stays whole.

D hidden channels, I MLP channels, T tokens. Source: arXiv 2603.19223, section on pruning: channels by activation
norm on calibration data, the first n layers. Which norm at which place it does not say; ours is stated below.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen3Model

from .config import Shape
from .model import Embedder
from .packing import pack


@dataclass
class Importance:
    """hidden (D): one score per residual channel, shared by all layers; mlp: one (I) per layer."""

    hidden: Tensor
    mlp: list[Tensor]


@torch.inference_mode()
def importance_scores(model: Embedder, texts: list[str]) -> Importance:
    """Activation norms over all tokens of the calibration texts.

    hidden: root of the summed squares of what the RMS norms hand on (both of each layer and the last one).
    mlp: the same of what enters down_proj.
    """
    squares: dict[str, Tensor] = {}

    def record(name: str, activation: Tensor) -> None:
        flat = activation.reshape(-1, activation.shape[-1]).double()  # (T, D or I)
        squares[name] = squares.get(name, 0) + flat.square().sum(0)

    handles = []
    layers = model.model.layers
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    for norm in (*norms, model.model.norm):
        handles.append(norm.register_forward_hook(lambda _module, _inputs, output: record("hidden", output)))
    for number, layer in enumerate(layers):
        hook = lambda _module, inputs, number=number: record(f"mlp{number}", inputs[0])  # noqa: E731
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(hook))
    try:
        for part in pack(model.tokenize(texts), model.token_budget):
            model.embed_pack(part, every_token=True)
    finally:
        for handle in handles:
            handle.remove()
    mlp = [squares[f"mlp{number}"].sqrt() for number in range(len(layers))]
    return Importance(hidden=squares["hidden"].sqrt(), mlp=mlp)


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores in their original order; of equal scores the first.

    The original order keeps the matryoshka order: a kept channel stays among the first if it was.
    """
    ranked = torch.sort(scores, descending=True, stable=True).indices
    return ranked[:count].sort().values


def prune_depth(model: Qwen3Model, layers: int) -> Qwen3Model:
    """A copy with the first `layers` layers."""
    config = _config(model, num_hidden_layers=layers)
    return _copy_weights(
        model, config, torch.arange(config.hidden_size), [torch.arange(config.intermediate_size)] * layers
    )


def prune_width(model: Qwen3Model, hidden_keep: Tensor, mlp_keep: list[Tensor]) -> Qwen3Model:
    """A copy with the residual channels `hidden_keep` and, per layer, the MLP channels `mlp_keep`."""
    config = _config(model, hidden_size=len(hidden_keep), intermediate_size=len(mlp_keep[0]))
    return _copy_weights(model, config, hidden_keep, mlp_keep)


def prune_to(model: Embedder, shape: Shape, scores: Importance) -> Embedder:
    """A student of the given shape, cut out of `model`; `model` stays as it is."""
    hidden_keep = keep_highest(scores.hidden, shape.hidden_dim)
    mlp_keep = [keep_highest(score, shape.mlp_dim) for score in scores.mlp[: shape.layers]]
    pruned = prune_width(prune_depth(model.model, shape.layers), hidden_keep, mlp_keep)
    return Embedder(pruned.eval(), model.tokenizer, model.max_tokens, model.token_budget)


def _config(model: Qwen3Model, **changed):
    """The configuration with other lengths; layer_types follows the depth, or transformers 5 refuses the model."""
    config = copy.deepcopy(model.config)
    config.update(changed)
    config.layer_types = config.layer_types[: config.num_hidden_layers]
    config.max_window_layers = config.num_hidden_layers
    return config


def _copy_weights(model: Qwen3Model, config, hidden_keep: Tensor, mlp_keep: list[Tensor]) -> Qwen3Model:
    """A model of `config` whose weights are the kept rows and columns."""
    pruned = type(model)(config).to(model.dtype).to(model.device)
    source = model.state_dict()
    kept = {name: _slice(name, source[name], hidden_keep, mlp_keep).clone() for name in pruned.state_dict()}
    pruned.load_state_dict(kept, strict=True)
    return pruned


def _slice(name: str, weight: Tensor, hidden: Tensor, mlp: list[Tensor]) -> Tensor:
    """The kept part of one weight; a matrix is (out, in)."""
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return weight
    if name.endswith(("layernorm.weight", "norm.weight")):
        return weight[hidden]
    if name.endswith(("embed_tokens.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight")):
        return weight[:, hidden]
    if name.endswith("o_proj.weight"):
        return weight[hidden]
    channels = mlp[int(name.split(".")[1])]
    if name.endswith(("gate_proj.weight", "up_proj.weight")):
        return weight[channels][:, hidden]
    if name.endswith("down_proj.weight"):
        return weight[hidden][:, channels]
    raise ValueError(f"no rule for the weight '{name}'; pruning knows Qwen3 only")
