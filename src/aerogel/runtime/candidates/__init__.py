"""Ways to execute a layer. A new idea is a new file here: a provider and its registration.

A provider looks at a `Layer` and yields `Candidate`s that would compute it; the tuner measures
them all and the lowering keeps the fastest. `torch_dense` is always among them.
"""

from __future__ import annotations

from aerogel.runtime.candidates import (  # noqa: F401  (register)
    gemv,
    native_dense,
    sparse_conv,
    spmm,
    torch_dense,
)
from aerogel.runtime.candidates.registry import (
    Candidate,
    Provider,
    candidates_for,
    provides,
)

__all__ = ["Candidate", "Provider", "candidates_for", "provides"]
