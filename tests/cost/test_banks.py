"""Bank conflicts: the simulation against cases worked out by hand, and layouts that must not lose elements."""

from __future__ import annotations

import pytest

from tilewise.cost.banks import ACCESSES, LAYOUTS, SharedTile, conflict_ways, warp_lanes, wavefronts


def test_wavefronts_by_hand() -> None:
    assert wavefronts([4 * lane for lane in range(32)], 4) == 1
    assert wavefronts([0] * 32, 4) == 1, "one word for all is a broadcast"
    assert wavefronts([2 * lane for lane in range(32)], 2) == 1, "two lanes share each word"
    assert wavefronts([8 * lane for lane in range(32)], 4) == 2, "stride two uses every other bank twice"
    assert wavefronts([128 * lane for lane in range(32)], 4) == 32
    assert wavefronts([132 * lane for lane in range(32)], 4) == 1, "one word of padding"
    assert wavefronts([16 * lane for lane in range(32)], 16) == 4, "16 bytes a lane: four quarter-warps"
    assert wavefronts([128 * lane for lane in range(32)], 16) == 32


@pytest.mark.parametrize("columns", [16, 32, 64, 128, 192])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_element_has_a_place_of_its_own(columns: int, layout: str, dtype: str) -> None:
    tile = SharedTile(24, columns, dtype, layout)  # type: ignore[arg-type]
    addresses = {tile.address(row, column) for row in range(24) for column in range(columns)}
    assert len(addresses) == 24 * columns
    assert max(addresses) < tile.nbytes
    if layout != "padded":
        assert tile.nbytes == 24 * tile.row_bytes


def test_a_swizzle_keeps_16_bytes_together() -> None:
    tile = SharedTile(16, 64, "float16", "swizzled")
    for row in range(16):
        for chunk in range(8):
            start = tile.address(row, 8 * chunk)
            assert start % 16 == 0
            assert [tile.address(row, 8 * chunk + i) for i in range(8)] == [start + 2 * i for i in range(8)]
    # Row r stores its first chunk at place r mod 8: the 128-byte mode.
    assert [tile.address(row, 0) - 128 * row for row in range(10)] == [0, 16, 32, 48, 64, 80, 96, 112, 0, 16]


@pytest.mark.parametrize("columns", [16, 32, 64, 128, 256])
def test_swizzling_ends_the_conflicts_of_ldmatrix(columns: int) -> None:
    plain = conflict_ways(SharedTile(64, columns), "matrix")
    assert plain == min(8, columns * 2 // 16)
    assert conflict_ways(SharedTile(64, columns, layout="swizzled"), "matrix") == 1
    assert conflict_ways(SharedTile(64, columns, layout="padded"), "matrix") == 1


def test_rows_never_conflict_and_plain_columns_do() -> None:
    for layout in LAYOUTS:
        assert conflict_ways(SharedTile(64, 64, layout=layout), "row") == 1
    assert conflict_ways(SharedTile(64, 64), "column") == 32
    assert conflict_ways(SharedTile(64, 32, "float32"), "column") == 32
    assert conflict_ways(SharedTile(64, 64, layout="swizzled"), "column") == 4


def test_a_warp_has_32_lanes_inside_the_tile() -> None:
    for access in ACCESSES:
        lanes, _ = warp_lanes(SharedTile(8, 16), access)
        assert len(lanes) == 32
        assert all(0 <= row < 8 and 0 <= column < 16 for row, column in lanes)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="layout: got 'zigzag'"):
        SharedTile(8, 8, layout="zigzag")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rows of 80 bytes; wants 32, 64 or a multiple of 128"):
        SharedTile(8, 40, layout="swizzled")
    with pytest.raises(ValueError, match="access: got 'diagonal'"):
        warp_lanes(SharedTile(8, 16), "diagonal")  # type: ignore[arg-type]
