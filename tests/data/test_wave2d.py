"""The wave solvers keep energy, converge, and agree; the submodel continues the whole model."""

from __future__ import annotations

import math

import pytest
import torch

from aerogel.data import wave2d
from aerogel.models import WaveSurrogate

PARAMS = torch.tensor([[0.3, 0.6, 1.0], [0.7, 0.4, 0.6]])


@pytest.mark.parametrize("method", wave2d.METHODS)
def test_error_on_a_standing_wave_falls_with_the_square_of_the_spacing(method: str) -> None:
    errors = []
    for cells in (16, 32):
        x = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
        shape = torch.outer((math.pi * x).sin(), (math.pi * x).sin())[None]
        step = 0.5 / cells
        border = torch.zeros(1, cells + 1, 4 * cells, dtype=torch.float64)
        model = wave2d.WaveSubmodel(1 / cells, step, method)
        found = model.solve(border, shape, torch.ones(1, dtype=torch.float64))[:, -1]
        exact = shape * math.cos(math.sqrt(2) * math.pi * 0.5)
        errors.append(float((found - exact).abs().max()))
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_leapfrog_keeps_energy() -> None:
    fields = wave2d.simulate(PARAMS, steps=200)
    found = wave2d.energy(fields, PARAMS[:, 2].double(), 1 / 23, wave2d.time_step(24))
    assert float((found / found[:, :1] - 1).abs().max()) < 0.01


def test_submodel_with_the_true_border_gives_the_whole_models_interior() -> None:
    for method in wave2d.METHODS[:1]:
        fields = wave2d.simulate(PARAMS, method=method)
        zone = wave2d.zone_slice(24, 16)
        inside = fields[:, :, zone, zone]
        model = wave2d.WaveSubmodel(1 / 23, wave2d.time_step(24), method)
        found = model.solve(wave2d.border_of(inside), inside[:, 0], PARAMS[:, 2].double())
        torch.testing.assert_close(found, inside)


def test_frames_pass_through_the_interpolation() -> None:
    frames = torch.randn(2, 5, 3)
    torch.testing.assert_close(wave2d.between_frames(frames, 6)[:, ::6], frames)


def test_generation_is_a_function_of_the_seed() -> None:
    first, second = wave2d.generate(3, 5), wave2d.generate(3, 5)
    assert first[1].shape == (3, 16, 16, 16)
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[1], wave2d.generate(3, 6)[1])


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="speed from"):
        wave2d.simulate(torch.tensor([[0.5, 0.5, 2.0]]))
    model = wave2d.WaveSubmodel(0.1, 0.08)
    with pytest.raises(ValueError, match="stable only"):
        model.solve(torch.zeros(1, 3, 12), torch.zeros(1, 4, 4), torch.ones(1))
    with pytest.raises(ValueError, match="boundary: shape"):
        model.solve(torch.zeros(1, 3, 11), torch.zeros(1, 4, 4), torch.ones(1))
    with pytest.raises(ValueError, match="method='euler'"):
        wave2d.generate(1, 0, method="euler")
    with pytest.raises(ValueError, match="out_shape"):
        WaveSurrogate(out_shape=(16, 16, 15))
