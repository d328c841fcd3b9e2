"""What GPUs can do at best, a source for each number, and an entry for a machine that was measured.

Matrix peaks are dense (no 2:4 sparsity) with float32 accumulation, which attention needs: consumer cards run fp16 with
float32 accumulation at half the rate that they advertise for fp16. Sizes of memory are as the vendor states them
(GB = 10⁹); on-chip sizes are in bytes (KB = 1024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tilewise import errors

KB = 1024
MB = 1024 * KB
REGISTER_FILE = 256 * KB
"""65536 registers of 32 bits a multiprocessor, on every architecture here (CUDA C++ Programming Guide)."""

_SHARED = "CUDA C++ Programming Guide, technical specifications per compute capability"


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of device. Quantities that are unknown or do not exist (shared memory of a CPU) are 0."""

    name: str
    arch: str
    """As `AttentionSpec.device` writes it: "sm_90", "cpu"."""
    matmul: Mapping[str, float]
    """Peak matrix FLOP/s by dtype name; "float32" is the full-precision rate, "tfloat32" the tensor cores'."""
    bandwidth: float
    """Memory bandwidth in bytes/s."""
    memory: int
    """Bytes."""
    sms: int
    """Multiprocessors; of a CPU the cores that may be used."""
    shared_per_sm: int
    """Bytes that the programs of one multiprocessor share."""
    shared_per_block: int
    """Most that a single program can have."""
    registers_per_sm: int
    """Bytes."""
    l2: int
    """Bytes of the last level of cache."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where each field's number comes from."""

    def peak(self, dtype: str) -> float:
        """Peak matrix FLOP/s. Raises ValueError where this device has no matrix units for `dtype`."""
        if dtype not in self.matmul:
            raise errors.bad_value("dtype", repr(dtype), f"one of {', '.join(self.matmul)} on {self.name}")
        return self.matmul[dtype]

    @property
    def usual_dtype(self) -> str:
        """What attention runs in here: bfloat16 where there are matrix units for it, else what is listed first."""
        return "bfloat16" if "bfloat16" in self.matmul else next(iter(self.matmul))

    def balance(self, dtype: str = "float16") -> float:
        """FLOP/byte at which the matrix peak and the memory bandwidth take the same time."""
        return self.peak(dtype) / self.bandwidth


def _gpu(
    name: str,
    arch: str,
    *,
    tflops: Mapping[str, float],
    gb_s: float,
    gb: int,
    sms: int,
    shared_kb: int,
    l2_mb: float,
    sources: Mapping[str, str],
) -> Device:
    reserved_kb = 0 if arch in ("sm_70", "sm_75") else 1
    return Device(
        name,
        arch,
        matmul={dtype: rate * 1e12 for dtype, rate in tflops.items()},
        bandwidth=gb_s * 1e9,
        memory=gb * 10**9,
        sms=sms,
        shared_per_sm=shared_kb * KB,
        shared_per_block=(shared_kb - reserved_kb) * KB,
        registers_per_sm=REGISTER_FILE,
        l2=round(l2_mb * MB),
        sources={"shared_per_sm": _SHARED, "shared_per_block": _SHARED, "registers_per_sm": _SHARED, **sources},
    )


def _all_from(source: str, **others: str) -> dict[str, str]:
    return {**dict.fromkeys(("matmul", "bandwidth", "memory", "sms", "l2"), source), **others}


_HOPPER = "NVIDIA H100 Tensor Core GPU Architecture whitepaper, tables of H100 SXM5 and PCIe"
_A100 = "NVIDIA A100 Tensor Core GPU Architecture whitepaper"
_HOPPER_SXM = {
    "float16": 989.4,
    "bfloat16": 989.4,
    "float8_e4m3fn": 1978.9,
    "float8_e5m2": 1978.9,
    "int8": 1978.9,
    "tfloat32": 494.7,
    "float32": 66.9,
    "float64": 66.9,
}
_AMPERE_100 = {
    "float16": 312.0,
    "bfloat16": 312.0,
    "int8": 624.0,
    "tfloat32": 156.0,
    "float32": 19.5,
    "float64": 19.5,
}

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu(
            "T4",
            "sm_75",
            tflops={"float16": 65.0, "int8": 130.0, "float32": 8.1},
            gb_s=320,
            gb=16,
            sms=40,
            shared_kb=64,
            l2_mb=4,
            sources=_all_from("NVIDIA Turing GPU Architecture whitepaper, Tesla T4 appendix"),
        ),
        _gpu(
            "V100",
            "sm_70",
            tflops={"float16": 125.0, "float32": 15.7, "float64": 7.8},
            gb_s=900,
            gb=32,
            sms=80,
            shared_kb=96,
            l2_mb=6,
            sources=_all_from("NVIDIA Tesla V100 datasheet, SXM2", l2="NVIDIA Volta GV100 Architecture whitepaper"),
        ),
        _gpu(
            "RTX 3090",
            "sm_86",
            tflops={"float16": 71.0, "bfloat16": 71.0, "int8": 284.0, "tfloat32": 35.6, "float32": 35.6},
            gb_s=936,
            gb=24,
            sms=82,
            shared_kb=100,
            l2_mb=6,
            sources=_all_from("NVIDIA Ampere GA102 GPU Architecture whitepaper, appendix A"),
        ),
        _gpu(
            "RTX 4090",
            "sm_89",
            tflops={
                "float16": 165.2,
                "bfloat16": 165.2,
                "float8_e4m3fn": 330.3,
                "float8_e5m2": 330.3,
                "int8": 660.6,
                "tfloat32": 82.6,
                "float32": 82.6,
            },
            gb_s=1008,
            gb=24,
            sms=128,
            shared_kb=100,
            l2_mb=72,
            sources=_all_from("NVIDIA Ada GPU Architecture whitepaper, appendix A"),
        ),
        _gpu(
            "A100 40GB",
            "sm_80",
            tflops=_AMPERE_100,
            gb_s=1555,
            gb=40,
            sms=108,
            shared_kb=164,
            l2_mb=40,
            sources=_all_from(_A100),
        ),
        _gpu(
            "A100 80GB",
            "sm_80",
            tflops=_AMPERE_100,
            gb_s=2039,
            gb=80,
            sms=108,
            shared_kb=164,
            l2_mb=40,
            sources=_all_from(
                _A100, bandwidth="NVIDIA A100 datasheet, 80 GB SXM", memory="NVIDIA A100 datasheet, 80 GB SXM"
            ),
        ),
        _gpu(
            "L40S",
            "sm_89",
            tflops={
                "float16": 362.05,
                "bfloat16": 362.05,
                "float8_e4m3fn": 733.0,
                "float8_e5m2": 733.0,
                "int8": 733.0,
                "tfloat32": 183.0,
                "float32": 91.6,
            },
            gb_s=864,
            gb=48,
            sms=142,
            shared_kb=100,
            l2_mb=96,
            sources=_all_from(
                "NVIDIA L40S datasheet",
                sms="NVIDIA L40S datasheet (142 RT cores, one a multiprocessor)",
                l2="NVIDIA Ada GPU Architecture whitepaper, L40 (the same AD102 configuration)",
            ),
        ),
        _gpu(
            "H100 PCIe",
            "sm_90",
            tflops={
                "float16": 756.5,
                "bfloat16": 756.5,
                "float8_e4m3fn": 1513.0,
                "float8_e5m2": 1513.0,
                "int8": 1513.0,
                "tfloat32": 378.0,
                "float32": 51.2,
                "float64": 51.2,
            },
            gb_s=2000,
            gb=80,
            sms=114,
            shared_kb=228,
            l2_mb=50,
            sources=_all_from(_HOPPER, matmul="NVIDIA H100 datasheet, PCIe (halved: it quotes 2:4 sparsity)"),
        ),
        _gpu(
            "H100 SXM",
            "sm_90",
            tflops=_HOPPER_SXM,
            gb_s=3350,
            gb=80,
            sms=132,
            shared_kb=228,
            l2_mb=50,
            sources=_all_from(_HOPPER, bandwidth="NVIDIA H100 datasheet, SXM"),
        ),
        _gpu(
            "H200",
            "sm_90",
            tflops=_HOPPER_SXM,
            gb_s=4800,
            gb=141,
            sms=132,
            shared_kb=228,
            l2_mb=50,
            sources=_all_from(_HOPPER, bandwidth="NVIDIA H200 datasheet, SXM", memory="NVIDIA H200 datasheet, SXM"),
        ),
        _gpu(
            "B200",
            "sm_100",
            tflops={
                "float16": 2250.0,
                "bfloat16": 2250.0,
                "float8_e4m3fn": 4500.0,
                "float8_e5m2": 4500.0,
                "int8": 4500.0,
                "tfloat32": 1100.0,
                "float32": 80.0,
                "float64": 40.0,
            },
            gb_s=8000,
            gb=180,
            sms=148,
            shared_kb=228,
            l2_mb=126,
            sources=_all_from(
                "NVIDIA Blackwell Architecture technical brief, HGX B200",
                memory="NVIDIA DGX B200 datasheet, an eighth of 1,440 GB",
                sms="as the driver reports it; published by Chips and Cheese, 2025",
                l2="as the driver reports it; published by Chips and Cheese, 2025",
            ),
        ),
    )
}
"""The device table, by name."""


_DRIVER_NAMES = {
    "Tesla T4": "T4",
    "Tesla V100-SXM2-32GB": "V100",
    "NVIDIA GeForce RTX 3090": "RTX 3090",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA A100-SXM4-40GB": "A100 40GB",
    "NVIDIA A100-PCIE-40GB": "A100 40GB",
    "NVIDIA A100-SXM4-80GB": "A100 80GB",
    "NVIDIA L40S": "L40S",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
}


def find(name: str) -> Device | None:
    """The entry of a name in this table or of the name that the driver gives a device; None for any other device."""
    return DEVICES.get(_DRIVER_NAMES.get(name, name))


def measured(
    name: str,
    *,
    arch: str,
    matmul: Mapping[str, float],
    bandwidth: float,
    memory: int,
    how: str,
    sms: int = 0,
    shared_per_sm: int = 0,
    shared_per_block: int = 0,
    registers_per_sm: int = 0,
    l2: int = 0,
) -> Device:
    """An entry for a machine whose rates were measured.

    Args:
        matmul: attained FLOP/s of a large matrix product, by dtype name.
        bandwidth: bytes read and written a second by a large copy.
        memory, l2, …: bytes.
        how: the measurement, with the versions that it was made under; it becomes the source of each number.

    Raises ValueError for a rate that is not positive.
    """
    for argument, rate in [*((f"matmul[{dtype!r}]", rate) for dtype, rate in matmul.items()), ("bandwidth", bandwidth)]:
        if not rate > 0:
            raise errors.bad_value(argument, rate, "a positive rate")
    fields = ("matmul", "bandwidth", "memory", "sms", "shared_per_sm", "shared_per_block", "registers_per_sm", "l2")
    return Device(
        name,
        arch,
        dict(matmul),
        bandwidth,
        memory,
        sms,
        shared_per_sm,
        shared_per_block,
        registers_per_sm,
        l2,
        sources=dict.fromkeys(fields, how),
    )
