"""Hostile notebooks."""

from registry import reads, refused  # noqa: F401
