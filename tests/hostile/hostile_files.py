"""Hostile files."""

from registry import reads, refused  # noqa: F401
