"""SAT, an accelerator for N:M training, as a deterministic model of cycles.

A sparse/dense systolic array runs the three products of every layer (forward FF, input gradient BP,
weight gradient WU); beside it work a unit that selects the n largest of every m weights (SORE), one
that updates the weights (WUVE) and vector units. A layer's stage takes the larger of its compute
and its memory cycles, with whichever dataflow is cheaper. Constants the paper does not give are
defaults of `SATConfig`, for the Xilinx VCU1525 board it uses.

Reference: Fang et al., arXiv 2309.13015, sections IV and V.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

Stage = Literal["FF", "BP", "WU"]
Dataflow = Literal["OS", "WS"]
Mode = Literal["dense", "sr_ste", "sdwp", "sdgp", "bdwp"]

MODES: tuple[Mode, ...] = ("dense", "sr_ste", "sdwp", "sdgp", "bdwp")
# Which stages read an N:M operand.
_SPARSE_STAGES: dict[Mode, tuple[Stage, ...]] = {
    "dense": (),
    "sr_ste": ("FF",),
    "sdwp": ("BP",),
    "sdgp": ("BP",),
    "bdwp": ("FF", "BP"),
}
# Normalisation, activation and addition, forward and backward, over every activation.
VECTOR_PASSES = 5
# Weight and momentum are read and written, the gradient is read.
UPDATE_TRANSFERS = 5


@dataclass(frozen=True)
class SATConfig:
    """The accelerator.

    Args:
        rows, cols: of the systolic array.
        freq_hz: its clock.
        mac_latency: cycles of a multiply-add.
        wuve_lanes, sore_lanes: of the update and of the selection unit.
        dram_bytes_per_s: four DDR4 channels of 19.2 GB/s on the board.
        act_bytes, weight_bytes: of an activation (fp16) and of a master weight (fp32).
        sparse_value_bytes: of a compressed weight (fp16).
        interleave: several accumulators in each element hide `mac_latency`.
        pregenerate: masks are selected and weights compressed behind the update, instead of before
            each of the two products.
        schedule: ``"offline"`` picks the cheaper dataflow for every stage; ``"OS"`` or ``"WS"``.

    Raises:
        ValueError: a value that is not above 0, or an unknown schedule.
    """

    rows: int = 32
    cols: int = 32
    freq_hz: float = 200e6
    mac_latency: int = 4
    wuve_lanes: int = 32
    sore_lanes: int = 32
    dram_bytes_per_s: float = 76.8e9
    act_bytes: float = 2
    weight_bytes: float = 4
    sparse_value_bytes: float = 2
    interleave: bool = True
    pregenerate: bool = True
    schedule: Literal["offline", "OS", "WS"] = "offline"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("interleave", "pregenerate", "schedule") and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value!r}")
        if self.schedule not in ("offline", "OS", "WS"):
            raise ValueError(f"schedule must be 'offline', 'OS' or 'WS', got {self.schedule!r}")

    @property
    def bytes_per_cycle(self) -> float:
        """What memory delivers in a cycle of the array."""
        return self.dram_bytes_per_s / self.freq_hz


@dataclass(frozen=True)
class Layer:
    """A linear or convolution layer in one training step.

    Attributes:
        name: of the module.
        positions: rows of the forward product, batch * height * width of the output.
        inputs: input channels.
        taps: kernel positions.
        outputs: output channels.
        input_numel: activations that come in.
        sparse: whether its weights are N:M.
    """

    name: str
    positions: int
    inputs: int
    taps: int
    outputs: int
    input_numel: int
    sparse: bool

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.inputs * self.taps * self.outputs

    def product(self, stage: Stage) -> tuple[int, int, int]:
        """Rows, reduction length and columns of a stage's product."""
        columns = self.inputs * self.taps
        return {
            "FF": (self.positions, columns, self.outputs),
            "BP": (self.positions, self.outputs, columns),
            "WU": (columns, self.positions, self.outputs),
        }[stage]


@dataclass(frozen=True)
class StageCost:
    """One line of the schedule."""

    layer: str
    stage: Stage
    dataflow: Dataflow
    pattern: str
    compute_cycles: int
    memory_cycles: int
    macs: int
    executed_macs: int

    @property
    def cycles(self) -> int:
        """Transfers run behind the array (double buffering)."""
        return max(self.compute_cycles, self.memory_cycles)

    @property
    def bound_by(self) -> str:
        """``"compute"`` or ``"memory"``."""
        return "compute" if self.compute_cycles >= self.memory_cycles else "memory"


@dataclass(frozen=True)
class SATReport:
    """One training step on the accelerator.

    Attributes:
        config: the accelerator.
        schedule: its stages, layer by layer.
        update_cycles: weight update with the selection behind or beside it.
        selection_cycles: selection that nothing hides.
        vector_cycles: normalisation, activations, additions.
        dense_cycles: of the same step without sparsity.
    """

    config: SATConfig
    schedule: tuple[StageCost, ...]
    update_cycles: int
    selection_cycles: int
    vector_cycles: int
    dense_cycles: int

    @property
    def matmul_cycles(self) -> int:
        """Of the products alone."""
        return sum(stage.cycles for stage in self.schedule)

    @property
    def cycles(self) -> int:
        """Of the whole step."""
        extra = self.update_cycles + self.selection_cycles + self.vector_cycles
        return self.matmul_cycles + extra

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.cycles / self.config.freq_hz

    @property
    def speedup(self) -> float:
        """Over the same step without sparsity."""
        return self.dense_cycles / self.cycles

    @property
    def utilisation(self) -> float:
        """Executed multiply-adds over what the array could do in the cycles of the products."""
        executed = sum(stage.executed_macs for stage in self.schedule)
        return executed / (self.matmul_cycles * self.config.rows * self.config.cols)

    @property
    def gflops(self) -> float:
        """GFLOP/s as if the products were dense."""
        return 2e-9 * sum(stage.macs for stage in self.schedule) / self.seconds

    @property
    def executed_gflops(self) -> float:
        """GFLOP/s that the array executes."""
        return 2e-9 * sum(stage.executed_macs for stage in self.schedule) / self.seconds


class SATModel:
    """Estimates training steps; see the module.

    Args:
        config: the accelerator.
    """

    def __init__(self, config: SATConfig | None = None) -> None:
        self.config = config or SATConfig()

    def estimate(
        self,
        model: nn.Module,
        input_shape: Sequence[int],
        batch: int,
        n: int = 2,
        m: int = 8,
        mode: Mode = "bdwp",
    ) -> SATReport:
        """One training step of a model.

        Args:
            model: linear and convolution layers of it count; the first, grouped convolutions, and a
                last linear layer whose outputs m does not divide stay dense.
            input_shape: of one sample, without the batch: (channels, height, width) or (features,).
            batch: samples a step.
            n: kept of every group.
            m: group length.
            mode: of `aerogel.pruning.BidirectionalNM`, or ``"dense"``.

        Raises:
            ValueError: batch below 1, not 1 <= n <= m, an unknown mode, a model without layers, or
                a sparse mode for a model whose layers all stay dense.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if not 1 <= n <= m:
            raise ValueError(f"n:m must have 1 <= n <= m, got {n}:{m}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        layers, activations = trace_layers(model, input_shape, batch, m)
        if mode != "dense" and not any(layer.sparse for layer in layers):
            raise ValueError(
                f"{n}:{m} {mode}: every layer of {type(model).__name__} stays dense (the first, "
                "grouped convolutions, a last linear layer that m does not divide); mode='dense' "
                "estimates it"
            )
        return self.estimate_layers(layers, activations, n, m, mode)

    def estimate_layers(
        self, layers: Sequence[Layer], activations: int, n: int, m: int, mode: Mode
    ) -> SATReport:
        """The same for a list of layers and the number of activations between them."""
        dense = self._step(layers, activations, n, m, "dense")
        step = dense if mode == "dense" else self._step(layers, activations, n, m, mode)
        return replace(step, dense_cycles=dense.cycles)

    def _step(
        self, layers: Sequence[Layer], activations: int, n: int, m: int, mode: Mode
    ) -> SATReport:
        config, sparse_stages = self.config, _SPARSE_STAGES[mode]
        stages = []
        selection = hidden = 0
        for index, layer in enumerate(layers):
            for stage in ("FF", "BP", "WU") if index else ("FF", "WU"):  # nothing below the first
                nm = (n, m) if layer.sparse and stage in sparse_stages else None
                stages.append(self._stage(layer, stage, nm, gradients=mode == "sdgp"))
                if nm is None:
                    continue
                rows, reduction, columns = layer.product(stage)
                chosen = reduction * (rows if mode == "sdgp" else columns)
                cycles = math.ceil(chosen / m / config.sore_lanes) * m
                # Gradients do not exist before the product that reads them.
                if config.pregenerate and mode != "sdgp":
                    hidden += cycles
                else:
                    selection += cycles
        weights = sum(layer.weights for layer in layers)
        transferred = UPDATE_TRANSFERS * config.weight_bytes * weights / config.bytes_per_cycle
        update = max(math.ceil(weights / config.wuve_lanes), math.ceil(transferred), hidden)
        moved = VECTOR_PASSES * config.act_bytes * activations
        vector = math.ceil(moved / config.bytes_per_cycle)
        return SATReport(config, tuple(stages), update, selection, vector, 0)

    def _stage(
        self, layer: Layer, stage: Stage, nm: tuple[int, int] | None, gradients: bool
    ) -> StageCost:
        rows, reduction, columns = layer.product(stage)
        length = reduction if nm is None else math.ceil(reduction / nm[1]) * nm[0]
        flows: tuple[Dataflow, ...] = (
            ("OS", "WS") if self.config.schedule == "offline" else (self.config.schedule,)
        )
        cycles = {flow: self._compute(flow, rows, length, columns) for flow in flows}
        flow = min(flows, key=lambda each: cycles[each])
        return StageCost(
            layer=layer.name,
            stage=stage,
            dataflow=flow,
            pattern="dense" if nm is None else f"{nm[0]}:{nm[1]}",
            compute_cycles=cycles[flow],
            memory_cycles=self._memory(layer, stage, length, columns, None if gradients else nm),
            macs=rows * reduction * columns,
            executed_macs=rows * length * columns,
        )

    def _compute(self, flow: Dataflow, rows: int, length: int, columns: int) -> int:
        config = self.config
        sigma = 1 if config.interleave else config.mac_latency
        fill = config.rows + config.cols - 2
        if flow == "OS":
            tiles = math.ceil(rows / config.rows) * math.ceil(columns / config.cols)
            return tiles * length * sigma + fill + config.rows
        tiles = math.ceil(length / config.rows) * math.ceil(columns / config.cols)
        return tiles * (config.rows + rows * sigma) + fill

    def _memory(
        self, layer: Layer, stage: Stage, length: int, columns: int, nm: tuple[int, int] | None
    ) -> int:
        config = self.config
        activations = layer.input_numel + layer.positions * layer.outputs
        if stage == "WU":
            weights = layer.weights * config.weight_bytes
        elif nm is None or not config.pregenerate:
            value = config.sparse_value_bytes if config.pregenerate else config.weight_bytes
            weights = layer.weights * value
        else:
            index = math.ceil(math.log2(nm[1])) / 8
            weights = length * columns * (config.sparse_value_bytes + index)
        return math.ceil((activations * config.act_bytes + weights) / config.bytes_per_cycle)


def trace_layers(
    model: nn.Module, input_shape: Sequence[int], batch: int, m: int
) -> tuple[list[Layer], int]:
    """The layers of a model in the order they run, and the number of activations they put out.

    Args:
        model: any module that takes one tensor.
        input_shape: of one sample.
        batch: samples a step.
        m: group length, which decides what stays dense.

    Raises:
        ValueError: no linear or convolution layer ran.
    """
    found: list[tuple[str, nn.Module, int, int]] = []
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    names: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, kinds)
    }

    def record(module: nn.Module, args: Any, output: Tensor) -> None:
        found.append((names[module], module, args[0].numel() * batch, output.numel() * batch))

    handles = [module.register_forward_hook(record) for module in names]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_shape))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear or convolution layers")
    last = len(found) - 1
    layers = [
        _layer(name, module, into, out, sparse=_is_sparse(module, index, last, m))
        for index, (name, module, into, out) in enumerate(found)
    ]
    return layers, sum(out for _, _, _, out in found)


def _layer(name: str, module: nn.Module, into: int, out: int, sparse: bool) -> Layer:
    weight = module.weight
    assert isinstance(weight, Tensor)
    outputs, inputs = weight.shape[:2]
    taps = math.prod(weight.shape[2:])
    return Layer(name, out // outputs, inputs, taps, outputs, into, sparse)


def _is_sparse(module: nn.Module, index: int, last: int, m: int) -> bool:
    if index == 0 or getattr(module, "groups", 1) != 1:
        return False
    weight = module.weight
    assert isinstance(weight, Tensor)
    return not (index == last and isinstance(module, nn.Linear) and weight.shape[0] % m)
