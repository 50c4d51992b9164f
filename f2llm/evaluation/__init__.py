"""Evaluation by mteb: tasks, and tables of scores."""

from .run import evaluate

__all__ = ["evaluate"]
