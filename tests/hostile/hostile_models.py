"""Hostile models."""

from registry import reads, refused  # noqa: F401
