"""How many blocks are streamed follows from bytes."""

import pytest

from transom.planning.placement import READ_AHEAD, BlockPlacement, place


@pytest.mark.parametrize(
    ("room", "streamed"),
    [
        (1100, ()),  # all of it fits, and needs no buffer
        (1099, (1, 5, 8)),  # three streamed and a buffer of two are 100 less
        (1000, (1, 5, 8)),
        (999, (1, 3, 6, 8)),
        (300, tuple(range(10))),
        (299, tuple(range(10))),  # the smallest placement, which the caller refuses
    ],
)
def test_the_fewest_blocks_are_streamed_that_must_be(room, streamed):
    made = place([100] * 10, 100, room)
    assert made.streamed == streamed
    assert made.streamed_bytes == 100 * len(streamed)
    assert made.memory_bytes == min(1100, 1100 - 100 * len(streamed) + 200)


def test_the_buffer_takes_the_largest_streamed_block():
    blocks = [10, 900, 20, 30, 40]
    made = place(blocks, 5, 0)
    # To stream the small ones alone takes less memory than a buffer for the large one.
    assert made.memory_bytes == min(
        BlockPlacement.of(blocks, 5, count).memory_bytes for count in (0, 3, 4, 5)
    )
    every = BlockPlacement.of(blocks, 5, 5)
    assert (every.resident_bytes, every.buffer_bytes) == (5, READ_AHEAD * 900)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_of_two_blocks_is_never_streamed(layers):
    assert place([100] * layers, 0, 0).streamed == ()


@pytest.mark.parametrize("count", range(3, 13))
def test_streamed_blocks_are_spread_evenly(count):
    streamed = BlockPlacement.of([1] * 12, 0, count).streamed
    gaps = [b - a for a, b in zip(streamed, (*streamed[1:], streamed[0] + 12), strict=True)]
    assert len(set(streamed)) == count
    assert max(gaps) - min(gaps) <= 1
