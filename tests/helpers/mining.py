"""The rules of the tests of mining: short ranges, so that every rule of the papers removes something."""

RULES = {
    "range_max": 20,
    "range_min": 2,
    "max_score": 0.8,
    "relative_margin": 0.05,
    "num_negatives": 5,
    "drop_short": False,
    "range_min_after": "ranking",
}
