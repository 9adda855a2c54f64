"""Waves on the unit square by finite differences: u_tt = c^2 (u_xx + u_yy).

Reference: the data of Boukraichi et al., arXiv 2304.04964, come from a finite-element model of a
2-D wave equation with a submodel on a zone of interest. Here a bump is let go at rest, u = 0 on
the border, and the parameters are its place and the wave speed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

METHODS = ("leapfrog", "newmark")
RANGES = {"x0": (0.2, 0.8), "y0": (0.2, 0.8), "speed": (0.5, 1.0)}
"""Uniform ranges of the parameters; lengths in sides of the square, speed in sides a unit time."""
WIDTH = 0.12
"""Of the initial bump exp(-((x - x0)^2 + (y - y0)^2) / (2 width^2)) times 16 x(1-x) y(1-y)."""
COURANT = 0.5
"""c dt / h of the fastest wave in `generate`."""
_LIMIT = 1.0 / math.sqrt(2.0)


def generate(
    n: int,
    seed: int,
    grid: int = 24,
    steps: int = 96,
    keep: int = 16,
    method: str = "leapfrog",
    *,
    zone: int = 16,
) -> tuple[Tensor, Tensor]:
    """Draw parameters and solve for the field in the middle of the square.

    Args:
        n: samples.
        seed: of the parameters.
        grid: nodes along a side, border included.
        steps: time steps, of 0.5 / (grid - 1) time units; a multiple of `keep`.
        keep: frames, at steps 0, steps / keep, 2 steps / keep, ..
        method: "leapfrog", or "newmark" (implicit; gamma 1/2, beta 1/4).
        zone: nodes along a side of the zone kept.

    Returns:
        params (n, 3), in the order of `RANGES`, and fields (n, keep, zone, zone), both float32.

    Raises:
        ValueError: an argument out of range.
    """
    if n < 1:
        raise ValueError(f"n={n}: expected at least 1")
    if keep < 1 or steps < keep or steps % keep:
        raise ValueError(f"steps={steps}, keep={keep}: expected steps a multiple of keep")
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.tensor(list(RANGES.values()), dtype=torch.float64).T
    params = low + (high - low) * torch.rand(n, 3, generator=generator, dtype=torch.float64)
    inside = zone_slice(grid, zone)
    fields = simulate(params, grid, steps, method)[:, : steps : steps // keep, inside, inside]
    return params.float(), fields.float()


def simulate(params: Tensor, grid: int = 24, steps: int = 96, method: str = "leapfrog") -> Tensor:
    """All steps on the whole square.

    Args:
        params: (n, 3), within `RANGES`.
        grid: nodes along a side.
        steps: time steps.
        method: as in `generate`.

    Returns:
        (n, steps + 1, grid, grid), float64; first axis of the square first.

    Raises:
        ValueError: parameters of another shape or out of range, or an argument out of range.
    """
    if params.dim() != 2 or params.shape[1] != len(RANGES):
        raise ValueError(f"params: shape {tuple(params.shape)}, expected (n, {len(RANGES)})")
    for (name, (low, high)), column in zip(RANGES.items(), params.double().T, strict=True):
        if not bool(((column >= low - 1e-6) & (column <= high + 1e-6)).all()):
            raise ValueError(
                f"params: {name} from {float(column.min()):.3g} to {float(column.max()):.3g}, "
                f"expected within [{low}, {high}]"
            )
    if grid < 3:
        raise ValueError(f"grid={grid}: expected at least 3 nodes along a side")
    x0, y0, speed = params.double().T[:, :, None, None]
    points = torch.linspace(0.0, 1.0, grid, dtype=torch.float64)
    x, y = points[None, :, None], points[None, None, :]
    bump = torch.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * WIDTH**2))
    initial = bump * 16 * x * (1 - x) * y * (1 - y)
    border = initial.new_zeros(len(params), steps + 1, 4 * grid - 4)
    submodel = WaveSubmodel(1.0 / (grid - 1), time_step(grid), method)
    return submodel.solve(border, initial, speed.flatten())


def time_step(grid: int) -> float:
    """Of `generate` on this grid, in time units."""
    return COURANT / (grid - 1) / RANGES["speed"][1]


def zone_slice(grid: int, zone: int) -> slice:
    """Nodes of the zone along either axis: in the middle of the square.

    Raises:
        ValueError: the zone does not fit or has no interior.
    """
    if not 3 <= zone <= grid:
        raise ValueError(f"zone={zone}: expected from 3 to grid={grid}")
    start = (grid - zone) // 2
    return slice(start, start + zone)


def scale_to_unit(fields: Tensor, reference: Tensor) -> Tensor:
    """Map the reference's least and greatest value to -1 and 1.

    Raises:
        ValueError: the reference is constant.
    """
    low, high = reference.min(), reference.max()
    if not bool(high > low):
        raise ValueError(f"reference: all values are {float(low)}, expected some spread")
    return (fields - low) * (2 / (high - low)) - 1


def border_of(fields: Tensor) -> Tensor:
    """(.., z, z) -> (.., 4 z - 4): the values on the border, row by row."""
    return fields[..., _border_mask(fields.shape[-1])]


def between_frames(frames: Tensor, every: int) -> Tensor:
    """Values at every step from values at each `every`-th, by cubic (Catmull-Rom) interpolation.

    Args:
        frames: (n, frames, values), at least two frames.
        every: steps from frame to frame.

    Returns:
        (n, (frames - 1) * every + 1, values).

    Raises:
        ValueError: fewer than two frames, or `every` below 1.
    """
    if frames.dim() != 3 or frames.shape[1] < 2 or every < 1:
        raise ValueError(
            f"frames: shape {tuple(frames.shape)}, every={every}: expected (n, 2 or more, values) "
            "and at least 1"
        )
    inner = (frames[:, 2:] - frames[:, :-2]) / 2
    first, last = frames[:, 1:2] - frames[:, :1], frames[:, -1:] - frames[:, -2:-1]
    slope = torch.cat([first, inner, last], dim=1)[:, :, None]
    value = frames[:, :, None]
    t = (torch.arange(every, dtype=frames.dtype, device=frames.device) / every)[:, None]
    made = value[:, :-1] * (1 + 2 * t) * (1 - t) ** 2 + value[:, 1:] * t**2 * (3 - 2 * t)
    made = made + slope[:, :-1] * t * (1 - t) ** 2 - slope[:, 1:] * t**2 * (1 - t)
    return torch.cat([made.flatten(1, 2), frames[:, -1:]], dim=1)


def energy(fields: Tensor, speed: Tensor, spacing: float, step: float) -> Tensor:
    """The discrete energy of a field with a resting border, between each two steps.

    Args:
        fields: (n, steps + 1, z, z).
        speed: (n,).
        spacing: between nodes.
        step: of time.

    Returns:
        (n, steps).
    """
    now, after = fields[:, :-1], fields[:, 1:]
    kinetic = ((after - now) / step).square().sum((-1, -2))
    elastic = sum((now.diff(dim=axis) * after.diff(dim=axis)).sum((-1, -2)) for axis in (-1, -2))
    return spacing**2 / 2 * kinetic + speed[:, None] ** 2 / 2 * elastic


@dataclass(frozen=True)
class WaveSubmodel:
    """The wave equation on a square zone whose border values are given, from rest.

    Attributes:
        spacing: between nodes.
        step: of time.
        method: "leapfrog" or "newmark".

    Raises:
        ValueError: a spacing or step that is not positive, or an unknown method.
    """

    spacing: float
    step: float
    method: str = "leapfrog"

    def __post_init__(self) -> None:
        if not (self.spacing > 0 and self.step > 0):
            raise ValueError(f"spacing={self.spacing}, step={self.step}: expected above 0")
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: expected one of {', '.join(METHODS)}")

    def solve(self, boundary: Tensor, initial: Tensor, speed: Tensor) -> Tensor:
        """The field at every step.

        Args:
            boundary: (n, steps + 1, 4 z - 4), values on the border, ordered as by `border_of`.
            initial: (n, z, z), the field at rest at step 0.
            speed: (n,), of the waves.

        Returns:
            (n, steps + 1, z, z).

        Raises:
            ValueError: shapes that do not fit, a value that is not finite, or a leapfrog step
                with c dt / h above 1 / sqrt(2), where it is unstable.
        """
        self._check(boundary, initial, speed)
        squared = (speed / self.spacing).square()[:, None, None]
        if self.method == "newmark":
            return self._newmark(boundary, initial, squared)
        mask = _border_mask(initial.shape[-1]).to(initial.device)
        ratio = squared * self.step**2
        now = _with_border(initial, boundary[:, 0], mask)
        fields = [now]
        before = None
        for values in boundary[:, 1:].unbind(1):
            pull = ratio * _second_difference(now)
            # From rest: the step before the first equals the step after it.
            after = now + pull / 2 if before is None else 2 * now - before + pull
            before, now = now, _with_border(after, values, mask)
            fields.append(now)
        return torch.stack(fields, dim=1)

    def _newmark(self, boundary: Tensor, initial: Tensor, squared: Tensor) -> Tensor:
        """gamma 1/2, beta 1/4; the five-point stencil is diagonal in the basis of sines."""
        mask = _border_mask(initial.shape[-1]).to(initial.device)
        inner, dt = initial.shape[-1] - 2, self.step
        index = torch.arange(1, inner + 1, dtype=initial.dtype, device=initial.device)
        sines = torch.sin(math.pi / (inner + 1) * index[:, None] * index)
        sines = sines * math.sqrt(2.0 / (inner + 1))
        roots = 2 - 2 * torch.cos(math.pi / (inner + 1) * index)
        scale = 1 + dt**2 / 4 * squared * (roots[:, None] + roots)
        now = _with_border(initial, boundary[:, 0], mask)
        pull = squared * _second_difference(now)[:, 1:-1, 1:-1]
        motion = torch.zeros_like(pull)
        fields = [now]
        for values in boundary[:, 1:].unbind(1):
            guess = now.clone()
            guess[:, 1:-1, 1:-1] += dt * motion + dt**2 / 4 * pull
            guess = _with_border(guess, values, mask)
            right = squared * _second_difference(guess)[:, 1:-1, 1:-1]
            following = sines @ ((sines @ right @ sines) / scale) @ sines
            guess[:, 1:-1, 1:-1] += dt**2 / 4 * following
            motion = motion + dt / 2 * (pull + following)
            now, pull = guess, following
            fields.append(now)
        return torch.stack(fields, dim=1)

    def _check(self, boundary: Tensor, initial: Tensor, speed: Tensor) -> None:
        n, side = initial.shape[0], initial.shape[-1]
        if initial.dim() != 3 or initial.shape[1] != side or side < 3:
            raise ValueError(f"initial: shape {tuple(initial.shape)}, expected (n, z, z), z >= 3")
        if boundary.dim() != 3 or boundary.shape[0] != n or boundary.shape[2] != 4 * side - 4:
            raise ValueError(
                f"boundary: shape {tuple(boundary.shape)}, "
                f"expected ({n}, steps + 1, {4 * side - 4})"
            )
        if speed.shape != (n,) or not bool((speed > 0).all()):
            raise ValueError(f"speed: shape {tuple(speed.shape)}, expected {n} positive numbers")
        for name, values in (("boundary", boundary), ("initial", initial), ("speed", speed)):
            if not bool(values.isfinite().all()):
                raise ValueError(f"{name}: NaN or infinite, expected finite values")
        courant = float(speed.max()) * self.step / self.spacing
        if self.method == "leapfrog" and courant > _LIMIT + 1e-9:
            raise ValueError(
                f"step={self.step:.4g}: c dt / h = {courant:.3f}, and leapfrog is stable only up "
                f"to 1/sqrt(2) = {_LIMIT:.3f}"
            )


def _border_mask(side: int) -> Tensor:
    mask = torch.ones(side, side, dtype=torch.bool)
    mask[1:-1, 1:-1] = False
    return mask


def _with_border(field: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    made = field.clone()
    made[:, mask] = values.to(field)
    return made


def _second_difference(field: Tensor) -> Tensor:
    """Five-point stencil, zero on the border."""
    made = torch.zeros_like(field)
    inner = field[:, 1:-1, 1:-1]
    across = field[:, :-2, 1:-1] + field[:, 2:, 1:-1] + field[:, 1:-1, :-2] + field[:, 1:-1, 2:]
    made[:, 1:-1, 1:-1] = across - 4 * inner
    return made
