"""Embeddings of a folder's probes in three ways: the kit, sentence-transformers, and transformers as a card says.

The weights are checked first, by the token ids of the contract: a fault of tokenizer, pooling or prompts is no fault of
the weights.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from ..contract import Probe, probe_texts
from ..encoder import ForeignEncoder
from ..model import Embedder, device_and_dtype, load_weights
from ..store.model_folder import NotComputed
from ..text import prompted
from .examined import Examined, Finding

DISTANCE = {True: 1e-3, False: 0.2}  # between unit vectors: all in float32, or not; the other is a cosine of 0.98


def replay(of: Examined, faulty: bool) -> list[Finding]:
    """Weights against the contract, then three ways to embed the same texts. faulty: a fault was found before."""
    decoder = of.pools_last_token or not of.modules
    if not decoder or of.config.get("model_type") is None:
        return [_foreign(of)]
    try:
        model = load_weights(of.folder, device_and_dtype()[1]).to(device_and_dtype()[0]).eval()
    except ValueError as error:
        return [Finding("WRONG", "weights", str(error))]
    probes = [probe for probe in of.contract.probes if probe.is_whole]
    reference = np.stack([_last_hidden_state(model, probe.token_ids) for probe in probes])
    found = [_weights(of, probes, reference)]
    if not of.modules and not of.own:
        return [*found, Finding("note", "embeddings", "not compared: which token is pooled is not declared")]
    compared = partial(_compared, of, probes, reference, faulty)
    found.append(compared("transformers", partial(_by_transformers, of, model)))
    del model
    found.append(compared("the kit", lambda texts: Embedder.load(of.folder).encode(texts)))
    found.append(compared("sentence-transformers", partial(_by_sentence_transformers, of)))
    return found


@torch.inference_mode()
def _last_hidden_state(model: PreTrainedModel, ids: list[int]) -> np.ndarray:
    """The embedding of token ids by transformers' own forward pass, at unit length."""
    hidden = model(input_ids=torch.tensor([ids], device=model.device)).last_hidden_state[0, -1]
    return torch.nn.functional.normalize(hidden.float(), dim=-1).cpu().numpy()


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The length of the difference, in lengths of what is expected; infinite if it is another number of numbers."""
    if found.shape != expected.shape:
        return float("inf")
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-12))


def _weights(of: Examined, probes: list[Probe], reference: np.ndarray) -> Finding:
    golden = {row: np.array(probe.embedding) for row, probe in enumerate(probes) if probe.embedding}
    if not golden:
        why = "its contract has no embeddings, `f2llm export` adds them" if of.own else "there is no contract"
        return Finding("note", "weights", f"whole; whether they are the original ones is not known: {why}")
    distances = {row: _distance(reference[row][: len(values)], values) for row, values in golden.items()}
    worst = max(distances, key=distances.get)
    if distances[worst] <= DISTANCE[of.exact]:
        return Finding("ok", "weights", f"{len(golden)} embeddings within {distances[worst]:.0e} of the contract's")
    text = f"found an embedding of the contract's token ids of {probes[worst].name!r} at a distance of "
    text += f"{distances[worst]:.2g} from the contract's, expected at most {DISTANCE[of.exact]:g}"
    return Finding("WRONG", "weights", f"{text}; remedy: the weights and the config.json that belong to the contract")


def _compared(
    of: Examined, probes: list[Probe], reference: np.ndarray, faulty: bool, name: str, encode: Callable
) -> Finding:
    """One way to embed the probes' texts, against the embeddings of their token ids."""
    try:
        rows = np.asarray(encode([probe.whole_text for probe in probes]), dtype=np.float32)
    except NotComputed as error:
        if not of.own:
            return Finding("note", name, f"not computed by its forward pass: {error}")
        reason = str(error)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
    else:
        if not of.contract.normalised:
            rows = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
        distances = [_distance(*pair) for pair in zip(rows, reference)]
        worst = int(np.argmax(distances))
        if distances[worst] <= DISTANCE[of.exact]:
            return Finding(
                "ok", name, f"{len(rows)} texts within {distances[worst]:.0e} of their token ids' embeddings"
            )
        reason = f"the embedding of {probes[worst].name!r} is {distances[worst]:.2g} from that of its token ids"
    if faulty:
        reason = reason.partition("; remedy: ")[0]
        return Finding("note", name, f"{reason}, as is to be expected with what is WRONG above")
    remedy = "other versions of transformers or sentence-transformers, and a report of this one"
    return Finding("WRONG", name, reason if "; remedy: " in reason else f"{reason}; remedy: {remedy}")


def _by_sentence_transformers(of: Examined, texts: list[str]) -> np.ndarray:
    try:
        import sentence_transformers
    except ImportError:
        raise ValueError("it is not installed; remedy: pip install sentence-transformers") from None
    model = sentence_transformers.SentenceTransformer(str(of.folder), local_files_only=True)
    return model.encode(texts, prompt="", show_progress_bar=False)


@torch.inference_mode()
def _by_transformers(of: Examined, model: PreTrainedModel, texts: list[str]) -> np.ndarray:
    """As the model card says: one padded batch, cut by the tokenizer, pooled where its side of padding puts the end."""
    options = {"truncation": True, "max_length": of.contract.max_tokens, "return_tensors": "pt"}
    batch = of.tokenizer(texts, padding=True, **options).to(model.device)
    last = batch["attention_mask"].sum(1) - 1
    if of.contract.padding_side == "left":
        last = torch.full_like(last, -1)
    rows = model(**batch).last_hidden_state[torch.arange(len(texts), device=model.device), last]
    return torch.nn.functional.normalize(rows.float(), dim=-1).cpu().numpy()


def _foreign(of: Examined) -> Finding:
    """A model that only sentence-transformers runs: whole, and with embeddings that do not depend on neighbours."""
    try:
        encoder = ForeignEncoder(of.folder)
    except ValueError as error:
        return Finding("WRONG", "weights", str(error))
    texts = [prompted(text * min(times, 20), instruction) for _, text, times, instruction in probe_texts(512)]
    together = encoder.embed_texts(texts).cpu().numpy()
    alone = np.concatenate([encoder.embed_texts([text]).cpu().numpy() for text in texts])
    worst = max(_distance(*pair) for pair in zip(together, alone))
    if worst <= DISTANCE[of.exact]:
        return Finding("ok", "sentence-transformers", f"{len(texts)} texts give the same alone and in a batch")
    text = f"found embeddings that differ by {worst:.2g} alone and in a batch, expected {DISTANCE[of.exact]:g} at most"
    return Finding("WRONG", "sentence-transformers", f"{text}; remedy: the tokenizer and its padding")
