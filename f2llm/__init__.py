"""A notebook-first reproducibility kit for the F2LLM and F2LLM-v2 text-embedding models."""

from .config import Config, load_config, resolve, root

__all__ = ["Config", "Embedder", "load_config", "resolve", "root"]


def __getattr__(name: str):
    """Embedder is imported when it is asked for: torch and transformers take seconds."""
    if name != "Embedder":
        raise AttributeError(f"module 'f2llm' has no attribute {name!r}")
    from .model import Embedder

    return Embedder
