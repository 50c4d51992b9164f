"""Hostile mirrors."""

from registry import reads, refused  # noqa: F401
