"""The integer program that gives every head one span rule within a budget at several lengths."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SpanProgram:
    """Binary x[head, rule], one rule per head, minimising losses under mean costs.

    Args:
        losses: (objectives, heads, rules): predicted loss of each choice, one objective per length.
        costs: (lengths, rules): share of the keys that a rule keeps.
        layers: (heads,) layer of each head.
        density: largest mean cost at every length.
        lower: least mean cost, as a share of `density`.
        rules_per_layer: different rules that the heads of a layer may have.
        time_limit: seconds for each solve.
    """

    losses: Array
    costs: Array
    layers: NDArray[np.int64]
    density: float
    lower: float
    rules_per_layer: int
    time_limit: float = 60.0

    def solve(
        self, objective: Array, bounds: dict[int, tuple[float, float]] | None = None
    ) -> NDArray[np.int64] | None:
        """The rule of every head, or None if there is no choice.

        Args:
            objective: (heads, rules), minimised.
            bounds: least and largest values of some of the objectives.
        """
        from scipy.optimize import Bounds, milp

        _, heads, rules = self.losses.shape
        size = heads * rules
        extra = (int(self.layers.max()) + 1) * rules
        weight = np.concatenate([objective.ravel(), np.zeros(extra)])
        scale = max(1e-30, float(np.abs(weight).max()))
        result: Any = milp(
            weight / scale,
            constraints=self._constraints(bounds or {}),
            integrality=np.ones(size + extra),
            bounds=Bounds(0, 1),
            options={"time_limit": self.time_limit, "mip_rel_gap": 1e-9},
        )
        if result.x is None:
            if result.status == 1:
                warnings.warn("HiGHS found no plan within its time limit", stacklevel=2)
            return None
        if result.status == 1:
            warnings.warn(
                f"HiGHS stopped at its time limit with a gap of {result.mip_gap:.2g}", stacklevel=2
            )
        chosen: NDArray[np.int64] = result.x[:size].reshape(heads, rules).argmax(1)
        return chosen

    def front(self, intervals: int) -> list[NDArray[np.int64]]:
        """Choices by the epsilon-constraint method: every objective alone, then each one with the
        others held in each combination of intervals of their ranges."""
        count = len(self.losses)
        alone = [self.solve(self.losses[n]) for n in range(count)]
        found = [choice for choice in alone if choice is not None]
        if not found or count == 1:
            return found
        values = np.array([[self.value(n, choice) for n in range(count)] for choice in found])
        low, high = values.min(0), values.max(0)
        edges = np.linspace(low, high, intervals + 1)
        for primary in range(count):
            others = [n for n in range(count) if n != primary]
            for cell in itertools.product(range(intervals), repeat=len(others)):
                bounds = {
                    n: (edges[c, n], edges[c + 1, n]) for n, c in zip(others, cell, strict=True)
                }
                choice = self.solve(self.losses[primary], bounds)
                if choice is not None:
                    found.append(choice)
        return found

    def value(self, objective: int, choice: NDArray[np.int64]) -> float:
        """Predicted loss of a choice at one length."""
        return float(self.losses[objective, np.arange(len(choice)), choice].sum())

    def _constraints(self, bounds: dict[int, tuple[float, float]]) -> list[Any]:
        from scipy.optimize import LinearConstraint
        from scipy.sparse import coo_array, csr_array, eye_array, hstack, kron, vstack

        _, heads, rules = self.losses.shape
        layers = int(self.layers.max()) + 1
        one = kron(eye_array(heads), np.ones((1, rules)))
        found = [LinearConstraint(_wide(one, layers * rules), 1, 1)]
        costs = csr_array(np.tile(self.costs, heads) / heads)
        slack = 1e-9
        least, most = self.lower * self.density - slack, self.density + slack
        found.append(LinearConstraint(_wide(costs, layers * rules), least, most))
        member = coo_array((np.ones(heads), (np.arange(heads), self.layers)), shape=(heads, layers))
        used = hstack([eye_array(heads * rules), -kron(member, eye_array(rules))])
        found.append(LinearConstraint(used, -np.inf, 0))
        per_layer = kron(eye_array(layers), np.ones((1, rules)))
        zero = csr_array((layers, heads * rules))
        found.append(LinearConstraint(hstack([zero, per_layer]), 0, self.rules_per_layer))
        if bounds:
            rows = vstack([csr_array(self.losses[n].reshape(1, -1)) for n in bounds])
            span = np.array(list(bounds.values()))
            size = np.maximum(np.abs(span).max(1), 1e-30)
            rows = rows.multiply(1 / size[:, None])
            low, high = span[:, 0] / size - slack, span[:, 1] / size + slack
            found.append(LinearConstraint(_wide(rows, layers * rules), low, high))
        return found


def _wide(matrix: Any, columns: int) -> Any:
    """With so many more columns of zeros."""
    from scipy.sparse import csr_array, hstack

    return hstack([matrix, csr_array((matrix.shape[0], columns))])
