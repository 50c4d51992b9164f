"""Packs: texts end to end without padding, up to a budget of tokens; and their division among processes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Pack:
    """N texts end to end, T tokens. rows: which texts; input_ids, position_ids (1, T); cu_seqlens (N + 1), int32."""

    rows: list[int]
    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    longest: int

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    def to(self, device: torch.device) -> "Pack":
        """The same on a device, copied while the device computes."""
        if device.type == "cpu":
            return self
        moved = (tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
                 for tensor in (self.input_ids, self.position_ids, self.cu_seqlens))  # fmt: skip
        return Pack(self.rows, *moved, self.longest)


def pack(token_ids: list[Sequence[int]], token_budget: int) -> Iterator[Pack]:
    """Packs of at most `token_budget` tokens of all texts, shortest texts first; a longer text goes alone.

    Neighbours of equal length are what attention on CPU computes together.
    """
    lengths = [len(ids) for ids in token_ids]
    for group in fill(lengths, token_budget, range(len(lengths))):
        yield make_pack(group, [token_ids[row] for row in group])


def fill(lengths: list[int], token_budget: int, rows: Iterable[int]) -> Iterator[list[int]]:
    """`rows` in groups of at most `token_budget` tokens, shortest texts first; a longer text goes alone."""
    group, tokens = [], 0
    for row in sorted(rows, key=lambda row: (lengths[row], row)):
        if group and tokens + lengths[row] > token_budget:
            yield group
            group, tokens = [], 0
        group.append(row)
        tokens += lengths[row]
    if group:
        yield group


def make_pack(rows: list[int], token_ids: list[Sequence[int]]) -> Pack:
    """One pack of texts of at least one token; an empty pack holds a text of which `rows` says nothing."""
    lengths = torch.tensor([len(ids) for ids in token_ids])
    cu_seqlens = torch.zeros(len(token_ids) + 1, dtype=torch.int32)
    cu_seqlens[1:] = lengths.cumsum(0)
    input_ids = torch.from_numpy(np.concatenate(token_ids, dtype=np.int64)).unsqueeze(0)
    starts = cu_seqlens[:-1].long().repeat_interleave(lengths)
    position_ids = (torch.arange(input_ids.shape[1]) - starts).unsqueeze(0)
    return Pack(rows, input_ids, position_ids, cu_seqlens, int(lengths.max()))


def share_out(lengths: list[int], num_shares: int) -> list[list[int]]:
    """Rows of each share, so that all shares have nearly the same number of tokens.

    The longest text goes to the share that has least so far (Graham's LPT rule); every process finds the same.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [0] * num_shares
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        least = loads.index(min(loads))
        shares[least].append(row)
        loads[least] += lengths[row]
    return shares
