"""Evaluation with mteb: models, tasks, and tables of scores."""

from .run import evaluate

__all__ = ["evaluate"]
