"""A notebook-first reproducibility kit for the F2LLM and F2LLM-v2 text-embedding models."""

from .config import Config, load_config, resolve, root

__all__ = ["Config", "load_config", "resolve", "root"]
