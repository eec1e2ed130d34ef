import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from viewmesh.geometry.rows import equal_rows


@given(st.integers(0, 40), st.integers(1, 4), st.sampled_from([1, 3, 2**31, 2**62]), st.integers(0, 9))
def test_finds_what_numpy_finds(count: int, columns: int, most: int, seed: int) -> None:
    few = np.random.default_rng(seed).integers(0, most, (5, columns))  # rows that repeat, also where a key overflows
    rows = few[np.random.default_rng(seed + 1).integers(0, 5, count)]
    first, inverse = equal_rows(rows)
    different, index, expected = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    np.testing.assert_array_equal(rows[first], different)
    np.testing.assert_array_equal(first, index)
    np.testing.assert_array_equal(inverse, expected.reshape(-1))
