"""Schedules: how sparse at step t, how much to swap at step t, and whether step t is due at all.

Every schedule is an immutable value with ``value(t)`` and ``due(t)``; ``t`` counts optimizer steps
from 0 (for `Geometric` and `FixedFraction`, rounds).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

from aerogel.arguments import check_count, check_number
from aerogel.sparsity.group_patterns import NM


@runtime_checkable
class Schedule(Protocol):
    """What the controller needs of a schedule."""

    def value(self, t: int) -> float:
        """The sparsity, or fraction to swap, or scalar, at step ``t``."""
        ...

    def due(self, t: int) -> bool:
        """Whether something happens at step ``t``."""
        ...


# ------------------------------------------------------------------------------- sparsity over time


@dataclass(frozen=True)
class OneShot:
    """Sparsity ``s`` from step ``at`` on, all at once."""

    at: int
    s: float

    def __post_init__(self) -> None:
        check_number("s", self.s, "[0, 1]")
        check_count("at", self.at, 0)

    def value(self, t: int) -> float:
        return self.s if t >= self.at else 0.0

    def due(self, t: int) -> bool:
        return t == self.at


@dataclass(frozen=True)
class Constant:
    """Sparsity ``s`` throughout, re-decided every ``every`` steps from ``begin`` to ``end``."""

    s: float
    every: int = 1
    begin: int = 0
    end: float = math.inf

    def __post_init__(self) -> None:
        check_number("s", self.s, "[0, 1]")
        _check_window(self.begin, self.end, self.every)

    def value(self, t: int) -> float:
        return self.s

    def due(self, t: int) -> bool:
        return self.begin <= t <= self.end and (t - self.begin) % self.every == 0


@dataclass(frozen=True)
class Cubic:
    """From ``s_i`` to ``s_f`` along ``1 - (1 - x)^power``: fast first, slow at the end.

    Due at ``begin + j * every`` for j = 0..n and never after; the ends are exact.

    Reference:
        Zhu and Gupta, arXiv 1710.01878.
    """

    s_i: float
    s_f: float
    begin: int
    n: int
    every: int
    power: float = 3.0

    def __post_init__(self) -> None:
        check_number("s_i", self.s_i, "[0, 1]")
        check_number("s_f", self.s_f, "[0, 1]")
        check_count("begin", self.begin, 0)
        check_count("n", self.n, 1)
        check_count("every", self.every, 1)
        check_number("power", self.power, "(0, inf)")

    @property
    def end(self) -> int:
        """The last step that is due."""
        return self.begin + self.n * self.every

    def value(self, t: int) -> float:
        done = min(max((t - self.begin) / (self.n * self.every), 0.0), 1.0)
        ramp = self.s_f + (self.s_i - self.s_f) * (1.0 - done) ** self.power
        if done == 0.0:
            return self.s_i
        # Rounding may step over an end by an ulp; the ends are promised exactly.
        return min(max(ramp, min(self.s_i, self.s_f)), max(self.s_i, self.s_f))

    def due(self, t: int) -> bool:
        return self.begin <= t <= self.end and (t - self.begin) % self.every == 0


@dataclass(frozen=True)
class Geometric:
    """Equal fractions of the alive weights in each of ``rounds`` rounds, ending at ``s_f``."""

    s_f: float
    rounds: int

    def __post_init__(self) -> None:
        check_number("s_f", self.s_f, "[0, 1)")
        check_count("rounds", self.rounds, 1)

    @property
    def fraction(self) -> float:
        """Share of the alive weights pruned per round."""
        return 1.0 - (1.0 - self.s_f) ** (1.0 / self.rounds)

    def value(self, t: int) -> float:
        done = min(max(t, 0), self.rounds)
        return self.s_f if done == self.rounds else 1.0 - (1.0 - self.s_f) ** (done / self.rounds)

    def due(self, t: int) -> bool:
        return 1 <= t <= self.rounds


@dataclass(frozen=True)
class FixedFraction:
    """A fixed share of the alive weights pruned in every round: ``1 - (1 - p)^t``."""

    p: float

    def __post_init__(self) -> None:
        check_number("p", self.p, "(0, 1)")

    @property
    def fraction(self) -> float:
        """Share of the alive weights pruned per round."""
        return self.p

    def value(self, t: int) -> float:
        return 1.0 - (1.0 - self.p) ** max(t, 0)

    def due(self, t: int) -> bool:
        return t >= 1


LadderKind = Literal["stepwise", "geometric", "densify"]


@dataclass(frozen=True)
class NMLadder:
    """N:M patterns that tighten rung by rung towards n:m.

    ``"stepwise"``: (m-1):m, m/2:m, m/4:m, ..., n:m. ``"geometric"``: 8n:8m, 4n:4m, 2n:2m, n:m.
    ``"densify"``: n:8m, n:4m, n:2m, n:m. Rungs take equal parts of ``[begin, end)``; each applies
    from its first step until the next begins, the last for ever.

    Args:
        n: kept per group at the end.
        m: group length at the end.
        kind: one of the above, or an explicit mapping {step: (n, m)}.
        begin: first step of the first rung.
        end: step at which the equal parts end.
        axis: of the patterns.
        axis_length: leave out rungs whose groups do not divide this length (geometric, densify).

    Reference:
        Bambhaniya et al., arXiv 2402.04744.
    """

    n: int
    m: int
    kind: LadderKind | Mapping[int, tuple[int, int]] = "stepwise"
    begin: int = 0
    end: int = 1
    axis: Literal[0, 1] = 1
    axis_length: int | None = None

    def __post_init__(self) -> None:
        check_count("m", self.m)
        check_count("n", self.n, 1, self.m)
        check_count("end", self.end, 0)
        if self.axis_length is not None:
            check_count("axis_length", self.axis_length)
        _check_window(self.begin, self.end, 1)
        if not self.rungs:
            raise ValueError("an N:M ladder needs at least one rung")

    @cached_property
    def patterns(self) -> tuple[NM, ...]:
        """The rungs' patterns, loosest first."""
        return tuple(NM(n, m, self.axis) for n, m in self._pairs())

    @cached_property
    def rungs(self) -> tuple[int, ...]:
        """First step of every rung."""
        if isinstance(self.kind, Mapping):
            return tuple(sorted(self.kind))
        count = len(self.patterns)
        length = self.end - self.begin
        return tuple(self.begin + math.ceil(rung * length / count) for rung in range(count))

    def rung(self, t: int) -> int:
        """Index of the rung in force at step ``t``; -1 before the first."""
        return sum(start <= t for start in self.rungs) - 1

    def pattern(self, t: int) -> NM | None:
        """The pattern in force at step ``t``, ``None`` before the first rung."""
        rung = self.rung(t)
        return None if rung < 0 else self.patterns[rung]

    def value(self, t: int) -> float:
        pattern = self.pattern(t)
        return 0.0 if pattern is None else 1.0 - pattern.fixed_density

    def due(self, t: int) -> bool:
        return t in self.rungs

    def _pairs(self) -> list[tuple[int, int]]:
        if isinstance(self.kind, Mapping):
            return [self.kind[step] for step in sorted(self.kind)]
        if self.kind == "stepwise":
            return self._stepwise()
        if self.kind not in ("geometric", "densify"):
            raise ValueError(
                f"kind must be 'stepwise', 'geometric', 'densify' or a mapping, got {self.kind!r}"
            )
        grow = self.kind == "geometric"
        pairs = [(self.n * (f if grow else 1), self.m * f) for f in (8, 4, 2, 1)]
        if self.axis_length is None:
            return pairs
        return [(n, m) for n, m in pairs if self.axis_length % m == 0]

    def _stepwise(self) -> list[tuple[int, int]]:
        ratio = self.m / self.n
        halvings = round(math.log2(ratio)) if ratio >= 1 else -1
        if 2**halvings != ratio:
            raise ValueError(f"a stepwise ladder needs m/n a power of two, got {self.n}:{self.m}")
        if halvings == 0:
            return [(self.n, self.m)]
        return [(self.m - 1, self.m), *((self.m >> j, self.m) for j in range(1, halvings + 1))]


# ------------------------------------------------------------------------------ scalars over time


@dataclass(frozen=True)
class Cosine:
    """``0.5 * z0 * (1 + cos(pi * (t - begin) / (end - begin)))``, 0 outside.

    Due strictly between ``begin`` and ``end``, at multiples of ``every`` after ``begin`` (RigL).
    """

    z0: float
    begin: int
    end: int
    every: int = 1

    def __post_init__(self) -> None:
        check_number("z0", self.z0, "[0, inf)")
        _check_window(self.begin, self.end, self.every)

    def value(self, t: int) -> float:
        if not self.begin <= t <= self.end or self.begin == self.end:
            return 0.0
        done = (t - self.begin) / (self.end - self.begin)
        return 0.5 * self.z0 * (1.0 + math.cos(math.pi * done))

    def due(self, t: int) -> bool:
        return self.begin < t < self.end and (t - self.begin) % self.every == 0


@dataclass(frozen=True)
class CosineFloor:
    """``z_min + 0.5 * (z0 - z_min) * (1 + cos(pi * t / T))``, ``z_min`` after ``T``."""

    z0: float
    T: int
    z_min: float = 0.005
    every: int = 1

    def __post_init__(self) -> None:
        check_number("z0", self.z0, "[0, inf)")
        check_number("z_min", self.z_min, "[0, inf)")
        check_count("T", self.T, 1)
        check_count("every", self.every, 1)

    def value(self, t: int) -> float:
        done = min(max(t / self.T, 0.0), 1.0)
        return self.z_min + 0.5 * (self.z0 - self.z_min) * (1.0 + math.cos(math.pi * done))

    def due(self, t: int) -> bool:
        return t > 0 and t % self.every == 0


@dataclass(frozen=True)
class Linear:
    """``max(0, 1 - k * tau)``, tau = steps since the dense phase ended at ``begin`` (1 before)."""

    k: float
    begin: int = 0

    def __post_init__(self) -> None:
        check_count("begin", self.begin, 0)
        check_number("k", self.k, "(0, inf)")

    def value(self, t: int) -> float:
        return max(0.0, 1.0 - self.k * max(0, t - self.begin))

    def due(self, t: int) -> bool:
        return True


@dataclass(frozen=True)
class Exponential:
    """``exp(-k * tau)``, tau = steps since the dense phase ended at ``begin`` (1 before)."""

    k: float
    begin: int = 0

    def __post_init__(self) -> None:
        check_count("begin", self.begin, 0)
        check_number("k", self.k, "(0, inf)")

    def value(self, t: int) -> float:
        elapsed = max(0, t - self.begin)
        return math.exp(-self.k * elapsed) if elapsed else 1.0

    def due(self, t: int) -> bool:
        return True


@dataclass(frozen=True)
class InversePower:
    """``z0 * (1 - t / T)^k``, 0 after ``T``."""

    z0: float
    k: float
    T: int
    every: int = 1

    def __post_init__(self) -> None:
        check_number("z0", self.z0, "[0, inf)")
        check_number("k", self.k, "(0, inf)")
        check_count("T", self.T, 1)
        check_count("every", self.every, 1)

    def value(self, t: int) -> float:
        return self.z0 * (1.0 - min(max(t / self.T, 0.0), 1.0)) ** self.k

    def due(self, t: int) -> bool:
        return 0 < t < self.T and t % self.every == 0


def _check_window(begin: int, end: float, every: int) -> None:
    check_count("begin", begin, 0)
    check_count("every", every, 1)
    check_number("end", end, "[0, inf]")
    if begin > end:
        raise ValueError(f"begin must not be after end, got {begin} > {end}")
