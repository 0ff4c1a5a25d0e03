"""What ranks bring to a sum, and what comes of it: the statistics of all values, however they are dealt out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flatwater import reference
from flatwater.paddle.sync.call import combine, contribution


@settings(deadline=None, max_examples=50)
@given(
    shares=st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(lambda shares: sum(shares) > 1),
    ratio=st.sampled_from([0.0, 1.0, 1e4, -1e4]),
    pivot=st.sampled_from([0.0, 1.0, 0.999]),
    seed=st.integers(0, 1000),
)
def test_contributions_combine_to_the_statistics_of_all_values(
    shares: list[int], ratio: float, pivot: float, seed: int
) -> None:
    x = np.random.default_rng(seed).standard_normal((sum(shares), 3, 5)) + ratio
    about = np.full(3, pivot * ratio)
    total = np.zeros(7)
    for start, end in pairwise(np.cumsum([0, *shares])):
        mine = reference.batch_statistics(x[start:end])
        total += contribution(mine.count, mine.mean, mine.variance * mine.count, about)
    expected = reference.batch_statistics(x)
    count, mean, m2 = combine(total, about)
    assert count == expected.count
    np.testing.assert_allclose(mean, expected.mean, rtol=1e-12, atol=1e-12)
    # 2^-53 of (mean - pivot)²/variance, which is at most 1e8 and, for a variance of few values, a little more.
    np.testing.assert_allclose(m2 / count, expected.variance, rtol=2e-7)


def test_a_sum_that_is_not_a_number_stays_one_in_its_channel_only() -> None:
    total = contribution(4, np.array([np.nan, 1.0]), np.array([np.nan, 8.0]), np.zeros(2))
    _, mean, m2 = combine(total, np.zeros(2))
    assert np.isnan([mean[0], m2[0]]).all()
    np.testing.assert_allclose([mean[1], m2[1]], [1.0, 8.0])
