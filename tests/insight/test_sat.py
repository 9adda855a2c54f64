"""The accelerator's cycle model: by hand on one layer, and what must hold for any network."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from torch import nn

from aerogel.insight import SATConfig, SATModel
from aerogel.insight.sat import MODES, Layer
from aerogel.sparsity.cost import nm_training_flops


def network():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def estimate(config=None, n=2, m=8, mode="bdwp", batch=64):
    return SATModel(config).estimate(network(), (3, 32, 32), batch, n, m, mode)


def test_one_layer_by_hand():
    layer = Layer("l", positions=64, inputs=64, taps=1, outputs=96, input_numel=4096, sparse=True)
    config = SATConfig(schedule="OS")
    first = replace(layer, name="first", sparse=False)
    report = SATModel(config).estimate_layers([first, layer], 0, 2, 8, "bdwp")
    stages = {(s.layer, s.stage): s for s in report.schedule}
    assert ("first", "BP") not in stages  # nothing below it wants a gradient
    forward = stages["l", "FF"]
    # 2 x 3 tiles, 64 / 8 * 2 = 16 kept of the reduction, 62 to fill and 32 to drain.
    assert forward.compute_cycles == 2 * 3 * 16 + 62 + 32
    # fp16 activations in and out; 16 * 96 values of 2 bytes and 3 bits; 384 bytes a cycle.
    moved = 2 * (4096 + 64 * 96) + 16 * 96 * (2 + 3 / 8)
    assert forward.memory_cycles == math.ceil(moved / 384)
    assert stages["l", "BP"].compute_cycles == 2 * 2 * 24 + 62 + 32
    assert stages["l", "WU"].compute_cycles == 2 * 3 * 64 + 62 + 32
    assert stages["l", "WU"].pattern == "dense"
    update = math.ceil(5 * 4 * 2 * 64 * 96 / 384)
    assert report.update_cycles == update > 2 * math.ceil(64 * 96 / 8 / 32) * 8 / 2


def test_weight_stationary_flow_by_hand():
    layer = Layer("l", positions=64, inputs=64, taps=1, outputs=96, input_numel=4096, sparse=True)
    report = SATModel(SATConfig(schedule="WS")).estimate_layers([layer], 0, 1, 1, "dense")
    assert report.schedule[0].compute_cycles == 2 * 3 * (32 + 64) + 62


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (2, 8), (1, 8), (2, 16)])
def test_products_never_gain_more_than_their_multiplications(mode, n, m):
    dense, sparse = estimate(mode="dense"), estimate(n=n, m=m, mode=mode)
    bound = 3 / nm_training_flops(1.0, n, m, mode)
    assert 1.0 <= dense.matmul_cycles / sparse.matmul_cycles <= bound
    assert sparse.speedup <= bound
    assert 0 < sparse.utilisation <= 1
    assert sparse.executed_gflops < sparse.gflops


def test_sparser_is_never_slower():
    cycles = [estimate(n=n, m=16).matmul_cycles for n in (16, 8, 4, 2, 1)]
    assert cycles == sorted(cycles, reverse=True)


def test_without_interleaving_every_element_waits_for_its_adder():
    plain = SATConfig(schedule="OS")
    waiting = replace(plain, interleave=False)
    for fast, slow in zip(estimate(plain).schedule, estimate(waiting).schedule, strict=True):
        fill = 32 + 62
        assert slow.compute_cycles - fill == 4 * (fast.compute_cycles - fill)


def test_selecting_beforehand_and_more_bandwidth_never_slow_a_step_down():
    base = SATConfig()
    assert estimate(base).cycles <= estimate(replace(base, pregenerate=False)).cycles
    wide = replace(base, dram_bytes_per_s=2 * base.dram_bytes_per_s)
    assert estimate(wide).cycles <= estimate(base).cycles
    assert estimate(replace(base, schedule="OS")).cycles >= estimate(base).cycles
    assert estimate(replace(base, schedule="WS")).cycles >= estimate(base).cycles


def test_stages_say_what_binds_them():
    starved = estimate(replace(SATConfig(), dram_bytes_per_s=1e8))
    assert {stage.bound_by for stage in starved.schedule} == {"memory"}
    assert all(s.cycles == max(s.compute_cycles, s.memory_cycles) for s in starved.schedule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"n": 9}, "1 <= n <= m, got 9:8"),
        ({"mode": "fast"}, "got 'fast'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        estimate(**options)
    with pytest.raises(ValueError, match="rows must be above 0, got 0"):
        SATConfig(rows=0)
    with pytest.raises(ValueError, match="no linear or convolution layers"):
        SATModel().estimate(nn.ReLU(), (4,), 1)


def test_a_pattern_that_no_layer_takes_is_refused():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
    with pytest.raises(ValueError, match="2:8 bdwp: every layer of Sequential stays dense"):
        SATModel().estimate(model, (16,), 4, 2, 8, "bdwp")
    assert SATModel().estimate(model, (16,), 4, 2, 8, "dense").speedup == 1.0
