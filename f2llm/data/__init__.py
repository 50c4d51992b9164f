"""Training data: the registry of sources, the mirror of the hub, readers, converters, and assembly into tuples."""

from .sources import load_source

__all__ = ["load_source"]
