"""Training data: the registry of sources, downloads to a mirror, readers, and the way from records to tuples."""

__all__ = ["load_source"]


def __getattr__(name: str):
    """load_source is imported when it is asked for: its readers take a third of a second."""
    if name != "load_source":
        raise AttributeError(f"module 'f2llm.data' has no attribute {name!r}")
    from .sources import load_source

    return load_source
