"""Training data: the registry of sources, the mirror of the hub, readers, and the way from records to tuples."""

from .sources import load_source

__all__ = ["load_source"]
