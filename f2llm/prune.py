"""Structured pruning along hidden size, MLP width and depth; attention stays whole.

D hidden channels, I MLP channels, L layers, T tokens. Source: arXiv 2603.19223, section on pruning: channels by
activation norm on calibration data, the first n layers. What it leaves open are the parameters of `prune` in
params.yaml; each choice is stated at the function that makes it.
"""

import copy
import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from .config import Prune, Shape
from .model import Embedder
from .packing import pack
from .store.model_folder import OF_LLAMA

LEAST = 1e-300  # the least number to divide by, in float64


@dataclass
class Importance:
    """What calibration texts tell of a model's channels and layers.

    hidden (D): one score per residual channel, shared by all layers; mlp: (I) of each layer; change (L): mean
    relative change of the residual stream's length. energy: for the input of each RMS norm, by name, (D) mean squares
    of the normalised channels, whose own mean is 1.
    """

    hidden: Tensor
    mlp: list[Tensor]
    change: Tensor
    energy: dict[str, Tensor]


def require_prunable(model_type: str) -> None:
    """ValueError unless the layers of such models are Llama's: two norms, attention and a gated MLP."""
    if model_type not in OF_LLAMA:
        raise ValueError(
            f"pruning of a {model_type!r} is not known: it cuts the weights of {', '.join(OF_LLAMA)}; "
            "remedy: one of these as backbone, or prune.leave_out with all students"
        )


@torch.inference_mode()
def importance_scores(model: Embedder, texts: list[str], norm: str = "l2", activations: str = "normed") -> Importance:
    """Norms of activations over all tokens of the calibration texts: l1, l2 (root of summed squares) or max.

    activations: what is measured of hidden channels before both blocks of each layer and at the end: normed (what the
    RMS norms hand on, their weights included) or residual (the stream itself). MLP channels: what enters down_proj.
    ValueError for a model whose layers are not named and ordered as Llama's.
    """
    require_prunable(model.model.config.model_type)
    statistics = ActivationStatistics(num_layers=len(model.model.layers), norm=norm, activations=activations)
    with statistics.hooked_to(model.model):
        for part in pack(model.tokenize(texts), model.token_budget):
            model.embed_pack(part, every_token=True)
            statistics.finish_pack(part.num_tokens)
    return statistics.importance()


class ActivationStatistics:
    """Sums over the tokens of all packs, in float64, that forward hooks add to.

    Of each channel its norm (l1, l2 or max); of each RMS norm's input the energy of its channels; of each layer the
    relative change of the residual stream's length.
    """

    MEASURES: ClassVar = {  # (T, channels) -> (channels)
        "l1": lambda flat: flat.abs().sum(0),
        "l2": lambda flat: flat.square().sum(0),
        "max": lambda flat: flat.abs().amax(0),
    }

    def __init__(self, num_layers: int, norm: str, activations: str):
        self.num_layers, self.norm, self.activations = num_layers, norm, activations
        self.scores: dict[str, Tensor] = {}  # "hidden" (D), "mlp0" (I), "mlp1", ...
        self.energy: dict[str, Tensor] = defaultdict(float)  # by RMS norm (D)
        self.lengths: list[Tensor] = []  # of the residual stream, (T) before every layer and after the last one
        self.change, self.num_tokens = torch.zeros(num_layers, dtype=torch.float64), 0

    @contextmanager
    def hooked_to(self, model: PreTrainedModel) -> Iterator[None]:
        """While the block runs, every forward pass of the model adds to the sums."""
        handles = [
            norm.register_forward_hook(
                lambda _module, inputs, output, name=name: self._at_norm(name, inputs[0], output)
            )
            for name, norm in _norms(model).items()
        ]
        handles += [
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda _module, inputs, name=f"mlp{number}": self._measure(name, inputs[0])
            )
            for number, layer in enumerate(model.layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _measure(self, name: str, activation: Tensor) -> None:
        found = self.MEASURES[self.norm](activation.reshape(-1, activation.shape[-1]).double())
        combine = torch.maximum if self.norm == "max" else torch.add
        self.scores[name] = combine(self.scores[name], found) if name in self.scores else found

    def _at_norm(self, name: str, stream: Tensor, output: Tensor) -> None:
        self._measure("hidden", output if self.activations == "normed" else stream)
        squares = stream.reshape(-1, stream.shape[-1]).double().square()
        self.energy[name] += (squares / squares.mean(-1, keepdim=True).clamp_min(LEAST)).sum(0)
        if not name.endswith("post_attention_layernorm"):
            self.lengths.append(squares.sum(-1).sqrt())

    def finish_pack(self, num_tokens: int) -> None:
        """Turn the stream's lengths of one forward pass into changes from layer to layer."""
        changes = [_relative_change(*pair).sum().cpu() for pair in itertools.pairwise(self.lengths)]
        self.change += torch.stack(changes)
        self.num_tokens += num_tokens
        self.lengths.clear()

    def importance(self) -> Importance:
        """What the sums tell."""
        root = torch.sqrt if self.norm == "l2" else torch.clone
        return Importance(
            hidden=root(self.scores["hidden"]),
            mlp=[root(self.scores[f"mlp{number}"]) for number in range(self.num_layers)],
            change=self.change / self.num_tokens,
            energy={name: total / self.num_tokens for name, total in self.energy.items()},
        )


def _relative_change(before: Tensor, after: Tensor) -> Tensor:
    """Of lengths (T); 0 where there was none, as that of a padding token's embedding."""
    return torch.where(before > 0, (after / before.clamp_min(LEAST) - 1).abs(), 0)


# What is kept -----------------------------------------------------------------------------------


def keep_channels(scores: Tensor, count: int, plan: Prune, generator: torch.Generator) -> Tensor:
    """Indices of `count` channels as plan.channels and plan.order have it; of equal scores the first.

    The original order keeps the matryoshka order: a kept channel stays among the first if it was, and distillation
    compares a student with its teacher's first channels.
    """
    if plan.channels == "first":
        return torch.arange(count)
    if plan.channels == "random":
        return torch.randperm(len(scores), generator=generator)[:count].sort().values
    ranked = torch.sort(scores.cpu(), descending=True, stable=True).indices[:count]
    return ranked if plan.order == "importance" else ranked.sort().values


def keep_mlp_channels(scores: Tensor, count: int, plan: Prune, generator: torch.Generator) -> Tensor:
    """As `keep_channels`, by importance or at random: an MLP's channels have no order that means anything."""
    if plan.channels == "random":
        return torch.randperm(len(scores), generator=generator)[:count].sort().values
    return torch.sort(scores.cpu(), descending=True, stable=True).indices[:count].sort().values


def keep_layers(change: Tensor, count: int, plan: Prune) -> list[int]:
    """The first or the last `count` layers, or those that change the stream's length most, in their order."""
    if plan.layers != "change":
        return list(range(count) if plan.layers == "first" else range(len(change) - count, len(change)))
    return torch.sort(change, descending=True, stable=True).indices[:count].sort().values.tolist()


# Cutting ----------------------------------------------------------------------------------------


def prune_depth(model: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """A copy with these layers."""
    whole = torch.arange(model.config.intermediate_size)
    return _cut(model, layers, torch.arange(model.config.hidden_size), [whole] * len(layers))


def prune_width(model: PreTrainedModel, hidden_keep: Tensor, mlp_keep: list[Tensor]) -> PreTrainedModel:
    """A copy with the residual channels `hidden_keep` and, per layer, the MLP channels `mlp_keep`.

    An RMS norm of fewer channels divides by the root of their mean square alone. So the copy equals the model whose
    other channels are 0 if its norms' weights are multiplied by sqrt(D / kept), up to the norms' epsilon.
    """
    return _cut(model, list(range(model.config.num_hidden_layers)), hidden_keep, mlp_keep)


def prune_to(model: Embedder, shape: Shape, scores: Importance, plan: Prune, seed: int) -> Embedder:
    """A student of the given shape, cut out of `model` as `plan` says; `model` stays as it is.

    Everything that is random is drawn by `seed`. With plan.weights random only the shape is taken over.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = keep_layers(scores.change, shape.num_hidden_layers, plan)
    hidden_keep = keep_channels(scores.hidden, shape.hidden_size, plan, generator)
    mlp_keep = [keep_mlp_channels(scores.mlp[layer], shape.intermediate_size, plan, generator) for layer in layers]
    if plan.weights == "random":
        torch.manual_seed(seed)
        config = _config(model.model, layers, shape.hidden_size, shape.intermediate_size)
        pruned = type(model.model)(config).to(model.model.dtype).to(model.device)
    else:
        pruned = _cut(model.model, layers, hidden_keep, mlp_keep)
        _rescale(pruned, layers, hidden_keep, scores, plan.rescale)
    student = Embedder(pruned.eval(), model.tokenizer, model.max_tokens, model.token_budget)
    student.autocast_dtype = model.autocast_dtype
    return student


@torch.no_grad()
def _rescale(pruned: PreTrainedModel, layers: list[int], hidden_keep: Tensor, scores: Importance, rule: str) -> None:
    """Multiply the weights of the RMS norms, which divide by the root mean square of fewer channels now.

    masked: by sqrt(D / kept), as if the dropped channels were 0. calibrated: by the root mean square that the kept
    channels had on the calibration texts, so that they keep the length that they had among all.
    """
    if rule == "none" or len(hidden_keep) == len(scores.hidden):
        return
    for name, norm in _norms(pruned, layers).items():
        kept_energy = scores.energy[name][hidden_keep.to(scores.energy[name].device)].mean()
        factor = len(scores.hidden) / len(hidden_keep) if rule == "masked" else float(kept_energy)
        norm.weight *= factor**0.5


def _norms(model: PreTrainedModel, layers: list[int] | None = None) -> dict[str, torch.nn.Module]:
    """The RMS norms over hidden channels, in the order of the forward pass, named by the layers they came from."""
    found = {}
    for number, layer in zip(layers or range(len(model.layers)), model.layers, strict=True):
        found[f"layers.{number}.input_layernorm"] = layer.input_layernorm
        found[f"layers.{number}.post_attention_layernorm"] = layer.post_attention_layernorm
    return found | {"norm": model.norm}


def _config(model: PreTrainedModel, layers: list[int], hidden_size: int, intermediate_size: int):
    """The configuration with other lengths; layer_types follows the depth, or transformers 5 refuses the model."""
    config = copy.deepcopy(model.config)
    config.update(
        {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": len(layers)}
    )
    config.head_dim = model.layers[0].self_attn.head_dim  # else it would follow the hidden size
    if kinds := getattr(model.config, "layer_types", None):
        config.layer_types = [kinds[layer] for layer in layers]
        config.max_window_layers = len(layers)
    return config


def _cut(model: PreTrainedModel, layers: list[int], hidden_keep: Tensor, mlp_keep: list[Tensor]) -> PreTrainedModel:
    """A model whose weights are the kept layers, rows and columns."""
    config = _config(model, layers, len(hidden_keep), len(mlp_keep[0]))
    with no_init_weights():  # all of them are overwritten
        pruned = type(model)(config).to(model.dtype).to(model.device)
    hidden_keep, mlp_keep = hidden_keep.to(model.device), [keep.to(model.device) for keep in mlp_keep]
    source, kept = model.state_dict(), {}
    for name in pruned.state_dict():
        number, origin = None, name
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            origin = f"layers.{layers[int(number)]}.{rest}"
        mlp = mlp_keep[int(number)] if number else None
        kept[name] = _slice(origin, source[origin], hidden_keep, mlp).clone()
    pruned.load_state_dict(kept, strict=True)
    return pruned


def _slice(name: str, weight: Tensor, hidden: Tensor, mlp: Tensor | None) -> Tensor:
    """The kept part of one weight; a matrix is (out, in). mlp: the kept channels of its layer."""
    if name.endswith(("q_norm.weight", "k_norm.weight", "q_proj.bias", "k_proj.bias", "v_proj.bias")):
        return weight
    if name.endswith(("gate_proj.bias", "up_proj.bias")):
        return weight[mlp]
    if name.endswith(("layernorm.weight", "norm.weight", "o_proj.bias", "down_proj.bias")):
        return weight[hidden]
    if name.endswith(("embed_tokens.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight")):
        return weight[:, hidden]
    if name.endswith("o_proj.weight"):
        return weight[hidden]
    if name.endswith(("gate_proj.weight", "up_proj.weight")):
        return weight[mlp][:, hidden]
    if name.endswith("down_proj.weight"):
        return weight[hidden][:, mlp]
    raise ValueError(f"no rule for the weight '{name}'; pruning knows the names of Llama and Qwen3")
