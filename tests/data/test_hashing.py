"""The hash is the documented one and never changes."""

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from dhen.data.hashing import hash_positions, hash_texts, hashed_ids, salt_of
from tests.data.preparation import reference_preparation as reference


def test_values_are_pinned():
    keys = pa.array(["68fd1e64", "", "a", "a rather long key of many words"])
    assert hash_texts(keys, salt_of("C1")).tolist() == [
        18419601458859421353,
        4175958694801506921,
        1172880438296947731,
        7776731532102629337,
    ]
    assert hashed_ids(pa.array(["68fd1e64", None, "80e26c9b"]), "C1", 100_000).tolist() == [88513, 0, 95321]
    assert hash_positions(np.arange(3), seed=0).tolist() == [0.6829518621387167, 0.627654457044415, 0.3989382094406274]


@settings(deadline=None)
@given(st.lists(st.none() | st.text(max_size=40)), st.integers(0, 2**64 - 1))
def test_equals_plain_python(texts, salt):
    # A slice, so that offsets do not start at 0.
    keys = pa.array(["xyz", *texts], pa.string()).slice(1)
    assert hash_texts(keys, salt).tolist() == [reference.hash_text(text or "", salt) for text in texts]


@settings(deadline=None)
@given(st.data(), st.integers(0, 20))
def test_of_one_length_equals_plain_python(data, length):
    texts = data.draw(
        st.lists(st.sampled_from([None, ""]) | st.text("0123456789abcdef", min_size=length, max_size=length))
    )
    keys = pa.array(["xyz", *texts], pa.string()).slice(1)
    assert hash_texts(keys, 7).tolist() == [reference.hash_text(text or "", 7) for text in texts]


@settings(deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 2**31))
def test_positions_equal_plain_python(position, seed):
    assert hash_positions(np.array([position]), seed)[0] == reference.uniform(position, seed)


def test_ids_fill_their_table_evenly_and_differ_between_features():
    keys = pa.array([f"{i:08x}" for i in range(100_000)])
    first, second = (hashed_ids(keys, feature, 101) for feature in ("C1", "C2"))
    for ids in (first, second):
        counts = np.bincount(ids, minlength=101)
        assert counts[0] == 0
        # 1,000 expected, with a standard deviation of 32.
        assert counts[1:].min() > 840
        assert counts[1:].max() < 1160
    assert 0.005 < (first == second).mean() < 0.015
