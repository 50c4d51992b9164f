"""Packs hold every text once within the budget; shares are even."""

import numpy as np
import pytest
import torch

from f2llm.packing import fill, pack, share_out

LENGTHS = np.random.default_rng(0).integers(1, 40, size=200).tolist()


def test_groups_hold_every_row_once_within_the_budget():
    groups = list(fill([*LENGTHS, 500], 100, range(201)))
    assert sorted(row for rows in groups for row in rows) == list(range(201))
    assert groups[-1] == [200], "one text beyond the budget goes alone"
    assert all(sum(LENGTHS[row] for row in rows) <= 100 for rows in groups[:-1])
    assert len(groups) < 60, "vacuous: texts do not share packs"
    assert list(fill([], 100, [])) == []


def test_a_pack_is_its_texts_end_to_end_with_their_boundaries_and_positions():
    token_ids = [[7, 8, 9], [5], [1, 2]]
    (part,) = pack(token_ids, token_budget=10)
    assert part.rows == [1, 2, 0]
    assert part.input_ids.tolist() == [[5, 1, 2, 7, 8, 9]]
    assert part.position_ids.tolist() == [[0, 0, 1, 0, 1, 2]]
    assert part.cu_seqlens.tolist() == [0, 1, 3, 6] and part.cu_seqlens.dtype == torch.int32
    assert (part.longest, part.num_tokens) == (3, 6)
    assert [part.rows for part in pack(token_ids, token_budget=3)] == [[1, 2], [0]]
    (stored,) = pack([np.array(ids, dtype=np.int32) for ids in token_ids], token_budget=10)
    assert torch.equal(stored.input_ids, part.input_ids) and stored.input_ids.dtype == torch.int64


@pytest.mark.parametrize("num_shares", [1, 2, 8])
def test_shares_are_disjoint_complete_and_even(num_shares):
    shares = share_out(LENGTHS, num_shares)
    assert sorted(row for share in shares for row in share) == list(range(len(LENGTHS)))
    tokens = [sum(LENGTHS[row] for row in share) for share in shares]
    assert max(tokens) / np.mean(tokens) < 1.01
    assert max(sum(LENGTHS[row] for row in range(n, 200, 8)) for n in range(8)) / (sum(LENGTHS) / 8) > 1.05, "vacuous"


def test_fewer_texts_than_shares_leave_shares_empty():
    assert share_out([3, 9], 4) == [[1], [0], [], []]
