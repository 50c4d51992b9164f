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
    """`encode` with rows as int8 or binary codes of sentence-transformers, read back as floats of about unit length.

    int8: 256 levels between -m and m, m the largest value of the task's rows. One scale for all dimensions keeps the
    angles; sentence-transformers' own ranges, one for each dimension, would not. binary: the signs.
    """
    from sentence_transformers.util.quantization import quantize_embeddings

    def coded(texts: list[str], instruction) -> np.ndarray:
        rows = np.ascontiguousarray(encode(texts, instruction))
        if precision == "binary":
            codes = quantize_embeddings(rows, "ubinary")
            signs = np.unpackbits(codes, axis=1, count=rows.shape[1]).astype(np.float32) * 2 - 1
            return signs / np.float32(np.sqrt(rows.shape[1]))
        largest = max(encode.largest, float(np.abs(rows).max(initial=1e-12)))
        limits = np.full((2, rows.shape[1]), largest, dtype=np.float32) * np.array([[-1], [1]], dtype=np.float32)
        codes = quantize_embeddings(rows, "int8", ranges=limits).astype(np.float32)
        return (codes + 1) * np.float32(largest / 127.5)  # the middle of each level

    return coded
