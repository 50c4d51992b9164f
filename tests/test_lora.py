"""Adapters: what is trained and what stays, against peft by hand, merged = unmerged, resumed = uninterrupted."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from helpers.closeness import assert_all_close, assert_close
from peft import LoraConfig, PeftModel, get_peft_model
from test_architectures import TEXTS, gradients, model, name, one_by_one  # noqa: F401 - fixtures
from transformers import AutoModel

from f2llm import lora
from f2llm.batches import HomogeneousBatches
from f2llm.config import Lora
from f2llm.model import Embedder
from f2llm.optimizer import build_optimizer
from f2llm.step import clip_gradients, compute_losses, grad_cache_backward, prepare
from f2llm.store.model_folder import LINEAR
from f2llm.store.run_log import Run
from f2llm.train import train

LORA = Lora(rank=4, alpha=8.0, dora=False, targets="all")
KINDS = {"lora": LORA, "dora": replace(LORA, dora=True), "some": replace(LORA, targets=["q_proj", "down_proj"])}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def adapted(embedder: Embedder, kind: Lora) -> Embedder:
    """An embedder with an adapter that changes every embedding, as after training."""
    lora.add_adapter(embedder.model, kind, seed=1)
    with torch.no_grad():
        for parameter in embedder.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return embedder


def trained_weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
