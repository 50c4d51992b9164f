"""For the tests of pruning: a model whose channels differ, its hidden states, and importance scores computed slowly."""

import itertools

import torch
import torch.nn.functional as F

from f2llm.model import Embedder
from f2llm.prune import Importance


@torch.no_grad()
def with_uneven_channels(embedder):
    """Norm weights and channels of the embedding of different lengths, as training leaves them; the embedder itself."""
    for name, parameter in embedder.model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 2)
    dim = embedder.dim
    embedder.model.embed_tokens.weight *= torch.linspace(0.5, 2, dim)[torch.randperm(dim)]
    return embedder


@torch.no_grad()
def hidden_states(model, texts):
    """Final hidden states of every text, one after the other."""
    return torch.cat([model.model(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids in model.tokenize(texts)])


def as_embedder(model, like):
    return Embedder(model.eval(), like.tokenizer, like.max_tokens)


def norms_of(model):
    """Name -> RMS norm over hidden channels."""
    return {name: part for name, part in model.named_modules() if name == "norm" or name.endswith("layernorm")}


def rms_norm(norm, x):
    """The formula of the norm, by hand."""
    return norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()


@torch.no_grad()
def slow_importance(model, texts, norm="l2", activations="normed"):
    """Oracle: one text at a time, layer by layer, every activation kept; then one look at all of them."""
    streams, inner, change = {name: [] for name in norms_of(model.model)}, [[] for _ in model.model.layers], []
    for ids in model.tokenize(texts):
        x = model.model.embed_tokens(torch.tensor([ids]))
        rotary, lengths = model.model.rotary_emb(x, torch.arange(len(ids))[None]), [x[0].norm(dim=-1)]
        for number, layer in enumerate(model.model.layers):
            streams[f"layers.{number}.input_layernorm"].append(x[0])
            x = x + layer.self_attn(rms_norm(layer.input_layernorm, x), rotary, attention_mask=None)[0]
            streams[f"layers.{number}.post_attention_layernorm"].append(x[0])
            after = rms_norm(layer.post_attention_layernorm, x)
            gated = F.silu(layer.mlp.gate_proj(after)) * layer.mlp.up_proj(after)
            inner[number].append(gated[0])
            x = x + layer.mlp.down_proj(gated)
            lengths.append(x[0].norm(dim=-1))
        streams["norm"].append(x[0])
        change.append(torch.stack([(after / before - 1).abs() for before, after in itertools.pairwise(lengths)]))
    streams = {name: torch.cat(parts) for name, parts in streams.items()}  # (T, D)
    measured = streams
    if activations == "normed":
        measured = {name: rms_norm(part, streams[name]) for name, part in norms_of(model.model).items()}

    def length(values):
        order = {"l1": 1, "l2": 2, "max": torch.inf}[norm]
        return torch.linalg.vector_norm(values.double(), ord=order, dim=0)

    return Importance(
        hidden=length(torch.cat(list(measured.values()))),
        mlp=[length(torch.cat(parts)) for parts in inner],
        change=torch.cat(change, dim=1).double().mean(1),
        energy={
            name: (x.double().square() / x.double().square().mean(-1, keepdim=True)).mean(0)
            for name, x in streams.items()
        },
    )
