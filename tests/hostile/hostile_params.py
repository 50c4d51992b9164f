"""Hostile params."""

from registry import reads, refused  # noqa: F401
