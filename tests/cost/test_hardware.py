"""The device table is complete, consistent with itself and sourced; tile shapes fit where they should."""

from __future__ import annotations

import pytest

from tilewise.cost import DEVICES, Device, TileShape, fitting_shapes, measured
from tilewise.cost.hardware import find
from tilewise.cost.tiles import flash_v2_counts
from tilewise.spec import AttentionSpec

NUMBERS = ("matmul", "bandwidth", "memory", "sms", "shared_per_sm", "shared_per_block", "registers_per_sm", "l2")


def test_the_devices_that_are_promised() -> None:
    promised = "T4, V100, RTX 3090, RTX 4090, A100 40GB, A100 80GB, L40S, H100 PCIe, H100 SXM, H200, B200"
    assert list(DEVICES) == promised.split(", ")


@pytest.mark.parametrize("device", DEVICES.values(), ids=list(DEVICES))
def test_every_number_has_a_source(device: Device) -> None:
    assert set(device.sources) == set(NUMBERS)
    assert all(device.sources.values())
    assert all(getattr(device, number) for number in NUMBERS)
    assert device.memory > device.l2 > device.shared_per_sm * 8
    assert device.peak("float16") >= 3 * device.peak("float32") or device.name in ("RTX 3090", "RTX 4090")


@pytest.mark.parametrize("name", ["RTX 3090", "RTX 4090", "H100 SXM", "A100 80GB"])
def test_matrix_peaks_follow_from_cores_and_clock(name: str) -> None:
    """Dense fp16 products with float32 accumulation: multiprocessors × FMAs a clock × 2 × boost clock.

    FMAs a clock and multiprocessor and clocks in GHz are from the whitepapers: GA102 256 at 1.695, AD102 256 at 2.52,
    GH100 2048 at 1.83, GA100 1024 at 1.41.
    """
    fma, clock = {
        "RTX 3090": (256, 1.695),
        "RTX 4090": (256, 2.52),
        "H100 SXM": (2048, 1.83),
        "A100 80GB": (1024, 1.41),
    }[name]
    assert DEVICES[name].peak("float16") == pytest.approx(DEVICES[name].sms * fma * 2 * clock * 1e9, rel=0.003)


def test_names_that_drivers_give() -> None:
    for driver, name in {
        "NVIDIA H200": "H200",
        "NVIDIA A100-SXM4-80GB": "A100 80GB",
        "NVIDIA H100 80GB HBM3": "H100 SXM",
        "Tesla T4": "T4",
        "L40S": "L40S",
    }.items():
        found = find(driver)
        assert found is not None
        assert found.name == name
    assert find("NVIDIA GeForce RTX 3090 Ti") is None
    assert find("NVIDIA H100 NVL") is None


def test_a_dtype_that_a_device_has_no_units_for() -> None:
    with pytest.raises(ValueError, match="dtype: got 'bfloat16'; wants one of float16, int8, float32 on T4"):
        DEVICES["T4"].peak("bfloat16")


def test_a_measured_machine() -> None:
    here = measured(
        "this CPU",
        arch="cpu",
        matmul={"float32": 186e9},
        bandwidth=20e9,
        memory=8 * 10**9,
        how="a 4096³ product and a 1 GB copy, torch 2.13.0",
    )
    assert here.balance("float32") == 9.3
    assert set(here.sources) == set(NUMBERS)
    with pytest.raises(ValueError, match="bandwidth: got 0; wants a positive rate"):
        measured("x", arch="cpu", matmul={"float32": 1.0}, bandwidth=0, memory=1, how="never")
    with pytest.raises(ValueError, match=r"matmul\['float32'\]: got nan; wants a positive rate"):
        measured("x", arch="cpu", matmul={"float32": float("nan")}, bandwidth=1, memory=1, how="never")


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (64, 64), (128, 64), (64, 128)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_tile_set_is_what_the_tile_loops_hold(block_m: int, block_n: int, dtype: str) -> None:
    spec = AttentionSpec(1, 1, 1, 256, 256, 40, 24, dtype=dtype)
    assert TileShape(block_m, block_n, 40, 24, dtype).total == flash_v2_counts(spec, block_m, block_n).on_chip_bytes


def test_intensity_of_a_tile_is_its_height() -> None:
    spec = AttentionSpec(1, 1, 1, 2**14, 2**14, 64, 64, dtype="bfloat16")
    for block_m in (64, 128):
        counts = flash_v2_counts(spec, block_m, 32)
        kv_bytes = counts.traffic.bytes_read - 2**14 * 64 * 2
        assert counts.matmul_flops / kv_bytes == TileShape(block_m, 32, 64, 64, "bfloat16").intensity == block_m


def test_which_shapes_fit() -> None:
    shape = TileShape(128, 128, 128, 128)
    # Q 32 KB and two stages of K and V, 128 KB: 160 KB, of the 163 of an A100 and the 227 of an H100.
    assert shape.shared(stages=2) == 160 * 1024
    assert shape.programs_per_sm(DEVICES["A100 80GB"], stages=2) == 1
    assert shape.programs_per_sm(DEVICES["RTX 4090"], stages=2) == 0
    assert shape.programs_per_sm(DEVICES["T4"], stages=1) == 0
    # Registers bound the small one: S and acc 16 KB each and 512 bytes of statistics, 7 times in 256 KB.
    assert TileShape(64, 64, 64, 64).programs_per_sm(DEVICES["H100 SXM"], stages=1) == 7


def test_fitting_shapes_are_sorted_and_fit() -> None:
    fitting = fitting_shapes(DEVICES["A100 80GB"], 64)
    assert all(programs >= 1 and shape.shared(2) <= 163 * 1024 for shape, programs in fitting)
    heights = [shape.block_m for shape, _ in fitting]
    assert heights == sorted(heights, reverse=True)
    small = {(shape.block_m, shape.block_n) for shape, _ in fitting_shapes(DEVICES["T4"], 256)}
    large = {(shape.block_m, shape.block_n) for shape, _ in fitting_shapes(DEVICES["H200"], 256)}
    assert small < large
