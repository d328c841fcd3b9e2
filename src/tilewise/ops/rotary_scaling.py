"""The frequencies of rotary embeddings, and the ways to stretch them over longer contexts, as values.

Pair i of `dim` rotated columns turns by `position · base^(−2i/dim)` radians. A scaling changes those frequencies; YaRN
also multiplies the rotated vectors by a factor. No tensors here: frequencies are float64 numbers.

Sources: Su et al., RoFormer (2021); Chen et al., Position interpolation (2023) for `LinearScaling`; bloc97, NTK-aware
scaled RoPE (2023) for `NTK` and `DynamicNTK`; Peng et al., YaRN (2023); the Llama 3.1 release (2024) for `Llama3`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

from tilewise.errors import bad_type, bad_value


def plain_frequencies(dim: int, base: float) -> list[float]:
    """`base^(−2i/dim)` for i < dim/2: radians that pair i turns by from one token to the next."""
    return [base ** (-2.0 * i / dim) for i in range(dim // 2)]


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's temperature, `0.1·weight·ln(factor) + 1`; 1 where nothing is stretched."""
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0


class Scaling(Protocol):
    """What every scaling gives."""

    name: ClassVar[str]

    @property
    def attention_factor(self) -> float:
        """What the rotated columns are multiplied by."""
        ...

    def frequencies(self, dim: int, base: float) -> list[float]:
        """dim/2 frequencies in radians a token, for `dim` rotated columns."""
        ...

    def parameters(self) -> list[float]:
        """The numbers that the frequencies depend on, in the order of the constructor."""
        ...


def _positive(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise bad_type(name, value, "a number")
        if not 0.0 < value < math.inf:
            raise bad_value(name, value, "a finite number above 0")


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor`.

    Raises TypeError or ValueError unless the factor is a number above 0.
    """

    factor: float
    name: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        _positive(factor=self.factor)

    @property
    def attention_factor(self) -> float:
        return 1.0

    def frequencies(self, dim: int, base: float) -> list[float]:
        return [f / self.factor for f in plain_frequencies(dim, base)]

    def parameters(self) -> list[float]:
        return [self.factor]


@dataclass(frozen=True, slots=True)
class NTK:
    """The base multiplied by `factor^(dim/(dim−2))`: the slowest pair is stretched by `factor`, the fastest not at all.

    Raises TypeError or ValueError unless the factor is a number above 0.
    """

    factor: float
    name: ClassVar[str] = "ntk"

    def __post_init__(self) -> None:
        _positive(factor=self.factor)

    @property
    def attention_factor(self) -> float:
        return 1.0

    def frequencies(self, dim: int, base: float) -> list[float]:
        return plain_frequencies(dim, base * self.factor ** (dim / (dim - 2)) if dim > 2 else base)

    def parameters(self) -> list[float]:
        return [self.factor]


@dataclass(frozen=True, slots=True)
class DynamicNTK:
    """`NTK` with a factor that grows with the length: a recipe, of which `at(length)` is the scaling.

    Args:
        factor: how fast; Transformers' `factor`.
        original_length: tokens that the model was trained for; up to them nothing changes.

    Keys that a cache holds were rotated for a shorter length, so this belongs to whole sequences; for decoding, fix the
    scaling at the length that will be reached.

    Raises TypeError or ValueError unless both are numbers above 0.
    """

    factor: float
    original_length: int

    def __post_init__(self) -> None:
        _positive(factor=self.factor, original_length=self.original_length)

    def at(self, length: int) -> NTK:
        """The scaling for sequences of `length` tokens."""
        return NTK(max(1.0, self.factor * length / self.original_length - (self.factor - 1.0)))


@dataclass(frozen=True, slots=True)
class YaRN:
    """Pairs that turn often within `original_length` keep their frequency, slow ones are divided by `factor`, and a
    linear ramp lies between.

    Args:
        factor: the longer context over the original one.
        original_length: tokens that the model was trained for.
        beta_fast, beta_slow: turns within `original_length` at which the ramp begins and ends.
        truncate: the ramp begins and ends at whole pairs, as in the paper's code.
        mscale, mscale_all_dim: DeepSeek's weights of the temperature; 0 for the paper's.
        factor_of_attention: what rotated vectors are multiplied by, where that is not to follow from the others.

    Raises TypeError or ValueError for numbers that are not above 0.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    factor_of_attention: float | None = None
    name: ClassVar[str] = "yarn"

    def __post_init__(self) -> None:
        _positive(factor=self.factor, original_length=self.original_length)
        _positive(beta_fast=self.beta_fast, beta_slow=self.beta_slow)

    @property
    def attention_factor(self) -> float:
        if self.factor_of_attention is not None:
            return self.factor_of_attention
        if self.mscale and self.mscale_all_dim:
            return mscale(self.factor, self.mscale) / mscale(self.factor, self.mscale_all_dim)
        return mscale(self.factor)

    @property
    def softmax_factor(self) -> float:
        """What DeepSeek multiplies the scale of the scores by: the square of the temperature of all columns."""
        return mscale(self.factor, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def frequencies(self, dim: int, base: float) -> list[float]:
        def pair_with(turns: float) -> float:
            return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = pair_with(self.beta_fast), pair_with(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = high - low or 0.001
        stretched = [min(1.0, max(0.0, (i - low) / width)) for i in range(dim // 2)]
        return [
            f / self.factor * s + f * (1.0 - s) for f, s in zip(plain_frequencies(dim, base), stretched, strict=True)
        ]

    def parameters(self) -> list[float]:
        return [self.factor, self.original_length, self.beta_fast, self.beta_slow, float(self.truncate)]


@dataclass(frozen=True, slots=True)
class Llama3:
    """Wavelengths above `original_length / low` are stretched by `factor`, those below `original_length / high` not at
    all, and in between smoothly.

    Raises TypeError or ValueError for numbers that are not above 0, or unless low < high.
    """

    factor: float = 8.0
    original_length: int = 8192
    low: float = 1.0
    high: float = 4.0
    name: ClassVar[str] = "llama3"

    def __post_init__(self) -> None:
        _positive(factor=self.factor, original_length=self.original_length, low=self.low, high=self.high)
        if self.low >= self.high:
            raise bad_value("low", self.low, f"a number below high = {self.high}")

    @property
    def attention_factor(self) -> float:
        return 1.0

    def frequencies(self, dim: int, base: float) -> list[float]:
        def scaled(f: float) -> float:
            turns = self.original_length * f / (2 * math.pi)
            kept = min(1.0, max(0.0, (turns - self.low) / (self.high - self.low)))
            return (1.0 - kept) * f / self.factor + kept * f

        return [scaled(f) for f in plain_frequencies(dim, base)]

    def parameters(self) -> list[float]:
        return [self.factor, self.original_length, self.low, self.high]


_BY_NAME = {kind.name: kind for kind in (LinearScaling, NTK, YaRN, Llama3)}


def frequencies(dim: int, base: float, name: str, parameters: tuple[float, ...]) -> list[float]:
    """What the scaling `name` with these parameters makes of base and dim; "" is no scaling."""
    return _BY_NAME[name](*parameters).frequencies(dim, base) if name else plain_frequencies(dim, base)  # pyright: ignore[reportArgumentType]
