"""What of the native kernels is there to test."""

from __future__ import annotations

import pytest

from aerogel import kernels

needs_native = pytest.mark.skipif(
    not kernels.native_available(), reason="the native kernels are not built"
)
ISAS = kernels.available_isas() if kernels.native_available() else ["none"]
"""Instruction sets of this machine."""
