"""Comparison of floating-point results that were computed in two ways, on the scale of what they were computed from.

Two ways, or two CPUs, round differently. The error is relative to the numbers on the way, not to the result: a loss of
0 is a difference of logits of 20, and a gradient of 0 a sum of terms that cancel.
"""

import numpy as np
import torch


def assert_close(found, expected, eps: float = 1e-5, scale: float | None = None, name: str = "") -> None:
    """No number is further from the expected one than eps * scale; by default the largest expected number's size."""
    found, expected = _array(found), _array(expected)
    assert found.shape == expected.shape, f"{name}: shape {found.shape}, expected {expected.shape}"
    scale = np.abs(expected).max() if scale is None else scale
    assert scale > 0, f"{name}: all expected numbers are 0; remedy: name the scale of their terms"
    error = np.abs(found - expected).max() / scale
    assert error <= eps, f"{name}: {error:.1e} apart on a scale of {scale:.3g}, allowed are {eps:.0e}"


def assert_all_close(found: dict, expected: dict, eps: float = 1e-5) -> None:
    """The same for tensors by name, on one scale for all: the largest number of any of them, such as a gradient's."""
    assert found.keys() == expected.keys(), f"{found.keys() ^ expected.keys()} are on one side only"
    scale = max(np.abs(_array(tensor)).max() for tensor in expected.values())
    for name, tensor in expected.items():
        assert_close(found[name], tensor, eps, scale, name)


def _array(values) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu()
    return np.asarray(values, dtype=np.float64)
