"""Shorter and smaller embeddings: matryoshka prefixes, int8 and binary codes."""

from collections.abc import Callable, Sequence

import numpy as np

PRECISIONS = {"float32": 4, "int8": 1, "binary": 1 / 8}  # bytes per dimension, or MB per million documents


def variants_of(
    encode: Callable, full: int, dims: Sequence[int] = (), precisions: Sequence[str] = ()
) -> dict[tuple[int, str], Callable]:
    """{(dim, precision): encode}: whole, with the first `dims` dimensions (those below `full`), and at `precisions`.

    encode: a `RememberedRows`, so that every text is embedded once. Binary codes need a multiple of 8 dimensions.
    """
    found = {(full, "float32"): encode}
    found |= {(dim, "float32"): at_dim(encode, dim) for dim in dims if dim < full}
    precisions = [precision for precision in precisions if precision != "float32"]
    return found | {(full, precision): at_precision(encode, precision) for precision in precisions}


def at_dim(encode: Callable, dim: int) -> Callable:
    """`encode` with the first `dim` dimensions only, scaled to unit length again."""

    def shortened(texts: list[str], instruction) -> np.ndarray:
        part = encode(texts, instruction)[:, :dim]
        return part / np.linalg.norm(part, axis=1, keepdims=True).clip(1e-12)

    return shortened


def at_precision(encode: Callable, precision: str) -> Callable:
    """`encode` with rows as int8 or binary codes of sentence-transformers, read back as floats of unit length.

    int8: 255 levels between -m and m, m the largest value of the row itself, so that a row's code depends on nothing
    else; m need not be kept, since a row has unit length. One scale for all dimensions keeps the angles;
    sentence-transformers' own ranges, one for each dimension, would not. binary: the signs.
    """
    from sentence_transformers.util.quantization import quantize_embeddings

    def coded(texts: list[str], instruction) -> np.ndarray:
        rows = np.ascontiguousarray(encode(texts, instruction))
        if precision == "binary":
            codes = quantize_embeddings(rows, "ubinary")
            signs = np.unpackbits(codes, axis=1, count=rows.shape[1]).astype(np.float32) * 2 - 1
            return signs / np.float32(np.sqrt(rows.shape[1]))
        limits = np.repeat(np.float32([[-1], [1]]), rows.shape[1], axis=1)
        largest = np.abs(rows).max(axis=1, keepdims=True).clip(1e-12)
        scaled = rows / largest * np.float32(1 - 1e-6)  # within the last level, not on its edge
        middles = quantize_embeddings(scaled, "int8", ranges=limits).astype(np.float32) + 1  # of each level
        return middles / np.linalg.norm(middles, axis=1, keepdims=True)

    return coded
