"""The plan: chunks, row groups and visits, against their definitions spelled out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hogwild_ext import _C, HIDDEN

TILE = _C.PAGE_SIZE
ROW_GROUP = 64


def make_plan(offsets, lengths, query_lengths, group=1, kv_heads=1, window=0, shared_keys=0):
    return _C.Plan(
        np.array(offsets, dtype=np.int32).reshape(len(query_lengths), len(lengths)),
        np.array(lengths, dtype=np.int32),
        np.array(query_lengths, dtype=np.int32),
        np.zeros(0, dtype=np.float32),
        group,
        kv_heads,
        window,
        shared_keys=shared_keys,
    )


@pytest.mark.parametrize("kv_heads", [1, 3, 8, 300])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 128, 129, 1134, 16384, 100_001])
def test_chunks_cover_a_segment_in_whole_tiles(length, kv_heads):
    chunks = make_plan([[0]], [length], [1], kv_heads=kv_heads).chunks
    assert chunks[0][1] == 0 and chunks[-1][2] == length
    for (_, _, end), (_, begin, _) in zip(chunks[:-1], chunks[1:], strict=True):
        assert end == begin and begin % TILE == 0
    assert len({end - begin for _, begin, end in chunks[:-1]}) <= 1
    if length > 128:
        assert len(chunks) * 128 <= length + 127
    if kv_heads <= 264 and length >= 128 * 264 // kv_heads:
        assert len(chunks) * kv_heads >= 128, "too few chunks to fill a large processor"


def test_a_segments_chunks_depend_on_nothing_else():
    alone = make_plan([[0]], [1134], [1], kv_heads=3).chunks
    among = make_plan(
        [[HIDDEN, 5, 7], [0, 9, HIDDEN]], [500, 1134, 3], [100, 1], group=5, kv_heads=3, window=9
    ).chunks
    assert [(b, e) for s, b, e in among if s == 1] == [(b, e) for _, b, e in alone]
    assert [s for s, _, _ in among] == sorted(s for s, _, _ in among)


layouts = st.integers(1, 6).flatmap(
    lambda workers: st.integers(1, 5).flatmap(
        lambda segments: st.tuples(
            st.lists(
                st.lists(
                    st.one_of(
                        st.just(HIDDEN),
                        st.integers(-50, 700),
                        st.sampled_from([2**31 - 1, -(2**31) + 1]),
                    ),
                    min_size=segments,
                    max_size=segments,
                ),
                min_size=workers,
                max_size=workers,
            ),
            st.lists(st.integers(0, 500), min_size=segments, max_size=segments),
            st.lists(st.integers(0, 40), min_size=workers, max_size=workers),
            st.sampled_from([1, 3, 5, 130]),
            st.sampled_from([0, 1, 17, 300]),
        )
    )
)


@given(layouts)
def test_a_visit_holds_the_rows_that_see_the_chunk(layout):
    offsets, lengths, query_lengths, group, window = layout
    plan = make_plan(offsets, lengths, query_lengths, group=group, window=window)
    rows_of = np.zeros((len(query_lengths), len(plan.chunks)), dtype=int)
    for visits in plan.visits:
        assert [chunk for chunk, _ in visits] == sorted({chunk for chunk, _ in visits})
        for chunk, spans in visits:
            for worker, first, last in spans:
                assert 0 <= first < last <= ROW_GROUP
                rows_of[worker, chunk] += last - first
            ranges = [(first, last) for _, first, last in spans]
            assert all(a[1] <= b[0] for a, b in zip(ranges[:-1], ranges[1:], strict=True))
    for w, brought in enumerate(query_lengths):
        for c, (segment, begin, end) in enumerate(plan.chunks):
            offset = offsets[w][segment]
            seeing = 0
            for i in range(brought if offset != HIDDEN else 0):
                last = min(offset + i, end - 1)
                first = max(begin, offset + i - window + 1 if window else begin)
                seeing += first <= last
            assert rows_of[w, c] == seeing * group


def test_workers_who_see_the_same_share_a_group():
    """70 workers of two teams, interleaved: no chunk is read by more groups than needed."""
    offsets = [[10, HIDDEN] if w % 2 else [HIDDEN, 10] for w in range(70)]
    plan = make_plan(offsets, [10, 10], [1] * 70)
    readers = [
        sum(any(c == chunk for c, _ in visits) for visits in plan.visits) for chunk in (0, 1)
    ]
    assert sorted(readers) == [1, 2]  # 35 rows each in groups of 64


# Short segments ----------------------------------------------------------------------------------


def shared_visits(offsets, lengths, query_lengths=None):
    plan = make_plan(offsets, lengths, query_lengths or [1] * len(offsets), shared_keys=32)
    (visits,) = plan.visits
    return [(chunk, [worker for worker, _, _ in spans]) for chunk, spans in visits]


def test_many_short_neighbours_share_tiles():
    offset = 1000
    for lengths, begins in [
        ([6] * 15, range(15)),  # too few
        ([6] * 16, [0, 10]),
        ([32] * 16, range(0, 16, 2)),
        ([1, 31, 29] * 6, range(0, 18, 3)),  # from even places on: 2 + 32 + 30
        ([1] * 33, [0, 32]),
        ([6] * 8 + [0] + [6] * 8, [0, 10]),
        ([6] * 10 + [33] + [6] * 10, range(21)),
        ([6] * 16 + [33] + [6] * 3, [0, 10, 16, 17, 18, 19]),
    ]:
        visits = shared_visits([[offset] * len(lengths)], lengths)
        assert visits == [(chunk, [0]) for chunk in begins], lengths


def test_what_is_hidden_does_not_part_neighbours():
    lengths, sees = [6] * 8 + [50] + [6] * 8, [1000] * 17
    hides = [*sees[:8], HIDDEN, *sees[9:]]
    assert shared_visits([hides], lengths) == [(0, [0]), (11, [0])]
    alone = [(chunk, [1]) for chunk in range(17)]
    visits = shared_visits([hides, sees, hides], lengths)
    assert visits == [alone[0], (0, [0, 2]), *alone[1:12], (11, [0, 2]), *alone[12:]]
