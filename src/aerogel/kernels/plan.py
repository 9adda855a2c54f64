"""A network as one native call: what `PlanBuilder` (plan_builder.py) builds and callers run."""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from aerogel.kernels import layers
from aerogel.kernels._library import native, native_in_use, reference_mode
from aerogel.kernels.layers import Layer, Shape, float_tensor
from aerogel.kernels.pace import Pace


@dataclass(frozen=True)
class OpInfo:
    """What one operation of a plan reads, writes and computes, for one image.

    Attributes:
        flops: two per multiply-add that is executed; zeros that are skipped do not count.
        bytes: weights, inputs and outputs.
    """

    name: str
    kind: str
    input_shapes: tuple[Shape, ...]
    output_shape: Shape
    flops: int
    bytes: int


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor inside a plan.

    Attributes:
        shape: of one image: (channels, height, width), (features, columns) or (features,).
        index: its number in the network.
        builder: the `PlanBuilder` that made it, and takes no other's.
    """

    shape: Shape
    index: int
    builder: object


@dataclass(frozen=True)
class Port:
    """An input or output: a value's number and the layout of the caller's tensor."""

    value: int
    layout: str


# A plane of so many bytes leaves little of a second-level cache to others. The operations around it
# run on bands of rows, for which the second number is the budget. Measured where that cache has
# 2 MiB: whole MobileNets are up to 1.1 times as fast on one thread, also where something else has
# run for a while, because what was never written need not be fetched from memory.
BANDS = (1 << 20, 5 << 18)
# Threads that each run a chain on a stretch of rows. Each makes its neighbours' last rows again:
# for more of them, sharing every operation is less work. Not measured for batches of images.
BANDED_THREADS = 4


@dataclass(frozen=True)
class Step:
    """One layer, applied to values by number."""

    name: str
    layer: Layer
    inputs: tuple[int, ...]
    output: int


@dataclass(frozen=True)
class Network:
    """Layers in execution order over numbered values; `shapes` are those of one image."""

    batch: int
    threads: int | None
    shapes: tuple[Shape, ...]
    steps: tuple[Step, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


@dataclass(frozen=True)
class Way:
    """How the threads of a run work.

    Attributes:
        most_threads: more are left idle; None uses all that the plan has.
        together: every operation of every image is shared; else each thread takes images of its own
            while there are enough.
    """

    most_threads: int | None = None
    together: bool = False

    def __str__(self) -> str:
        count = "all threads" if self.most_threads is None else f"{self.most_threads} thread(s)"
        return f"{count} together" if self.together else count


class Plan:
    """A network ready to run; made by `PlanBuilder.build`. Runs may overlap in several threads.

    Attributes:
        batch: images of a run.
        threads: of a run; None follows torch's setting at every run.
        way: how they work. `adapt` lets the runs themselves correct it.
    """

    def __init__(self, network: Network) -> None:
        self.batch = network.batch
        self.threads = network.threads
        self.way = Way()
        self._others: tuple[Way, Pace] | None = None
        self._steps = network.steps
        self._inputs = network.inputs
        self._outputs = network.outputs
        self._shapes = network.shapes
        self._input_shapes = tuple(self._outer_shape(port) for port in self._inputs)
        self._output_shapes = tuple(self._outer_shape(port) for port in self._outputs)
        single = len(self._inputs) == len(self._outputs) == 1
        self._only_input = self._input_shapes[0] if single else None
        # Another one like this takes 5 us less than one from shape, dtype and device. It has no
        # memory to speak of, and what is like it is contiguous.
        one = torch.empty(1, dtype=torch.float32, device="cpu")
        self._like_output = one.expand(self._output_shapes[0]) if single else one
        self._native: Any = None
        self._build_lock = threading.Lock()
        if native_in_use() is not None:
            self._native = self._build_native()

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Executes the plan.

        Args:
            inputs: one float32 CPU tensor per input, (batch, *shape).

        Returns:
            One new tensor per output, (batch, *shape). No gradient flows.

        Raises:
            TypeError: not float32 CPU tensors.
            ValueError: wrong number or shapes of tensors.
        """
        tensors = self._checked(inputs)
        if native_in_use() is None:
            return self._run_reference(tensors)
        outputs = self._empty_outputs()
        self._run_native([x.data_ptr() for x in tensors], [y.data_ptr() for y in outputs])
        return outputs

    def run_plain(self, x: Tensor) -> Tensor | None:
        """`run` of one tensor for one, in few steps: after other work each finds its caches cold.

        Args:
            x: a float32 CPU tensor without gradient, contiguous, (batch, *shape).

        Returns:
            The output, or None if `run` has to look: the tensor is another, or the plan has more
            inputs or outputs, or the references run.
        """
        if type(x) is not Tensor or not _is_plain(x, self._only_input) or native_in_use() is None:
            return None
        y = torch.empty_like(self._like_output)
        self._run_native([x.data_ptr()], [y.data_ptr()])
        return y

    def _run_native(self, inputs: list[int], outputs: list[int]) -> None:
        """Run on addresses, the way that is set or the one that has become faster."""
        threads = self.threads or torch.get_num_threads()
        if self._others is None or threads == 1:
            return self._run_one_way(self.way, threads, inputs, outputs)
        second, pace = self._others
        other = pace.other
        if pace.resting():
            return self._run_one_way(second if other else self.way, threads, inputs, outputs)
        begin = perf_counter()
        self._run_one_way(second if other else self.way, threads, inputs, outputs)
        pace.took(other, perf_counter() - begin)

    def _run_one_way(self, way: Way, threads: int, inputs: list[int], outputs: list[int]) -> None:
        most = threads if way.most_threads is None else min(threads, way.most_threads)
        self._native_plan().run(inputs, outputs, most, way.together)

    def adapt(self) -> None:
        """From now on compare several threads with one in runs themselves (see pace.py).

        What is compared is the way that is set with one thread alone, or with all threads if it is
        one thread already. The results of a run do not depend on it.
        """
        self._others = Way() if self.way.most_threads == 1 else Way(1), Pace()

    def ways(self) -> list[Way]:
        """The ways worth timing with the threads that a run has now, from one thread upwards."""
        threads = self.threads or torch.get_num_threads()
        counts = sorted({threads, *(1 << n for n in range(threads.bit_length() - 1)), 1})
        apart = [Way(None if count == threads else count) for count in counts]
        if threads == 1 or self.batch == 1:
            return apart
        return [*apart, Way(None, together=True)]

    def profile(self, inputs: Sequence[Tensor], repeats: int = 5) -> list[tuple[str, float]]:
        """Median seconds of every step of a run, copies in and out included.

        All threads share every step, unless a run would give each images of its own: then a single
        thread is timed, and they are taken to halve (and so on) its time.

        Args:
            inputs: as for `run`.
            repeats: runs to take the median of, after one that is not counted.

        Returns:
            (name, seconds) in execution order; a step's seconds are the sum over the batch.

        Raises:
            RuntimeError: the native kernels are missing or switched off.
        """
        tensors = self._checked(inputs)
        if reference_mode():
            raise RuntimeError("profile: AEROGEL_KERNELS=reference runs no native steps")
        outputs = self._empty_outputs()
        addresses = [x.data_ptr() for x in tensors], [y.data_ptr() for y in outputs]
        threads = self.threads or torch.get_num_threads()
        apart = threads if self.batch >= threads and not self.way.together else 1
        threads //= apart
        plan = self._native_plan()
        rounds = [plan.profile(*addresses, threads) for _ in range(repeats + 1)][1:]
        medians = (statistics.median(row[1] for row in rows) for rows in zip(*rounds, strict=True))
        return [
            (name, seconds / apart) for (name, _), seconds in zip(rounds[0], medians, strict=True)
        ]

    def describe(self) -> list[OpInfo]:
        """One row per operation, in execution order."""
        rows = []
        for step in self._steps:
            shapes = tuple(self._shapes[i] for i in step.inputs)
            output = self._shapes[step.output]
            moved = 4 * (sum(math.prod(s) for s in shapes) + math.prod(output))
            layer = step.layer
            rows.append(
                OpInfo(step.name, layer.kind, shapes, output, layer.flops(output),
                       moved + layer.weight_bytes)
            )  # fmt: skip
        return rows

    @property
    def arena_bytes(self) -> int:
        """Bytes of intermediate activations for one run (of one image at a time)."""
        return int(self._native_plan().arena_bytes)

    def _outer_shape(self, port: Port) -> Shape:
        shape = self._shapes[port.value]
        return (self.batch, *(shape[::-1] if port.layout == "tokens" else shape))

    def _empty_outputs(self) -> list[Tensor]:
        # Whatever torch's default dtype and device are: addresses of float32 memory are wanted.
        return [torch.empty(s, dtype=torch.float32, device="cpu") for s in self._output_shapes]

    @property
    def only_shapes(self) -> tuple[Shape, Shape] | None:
        """(input, output) of a plan that has one of each, batch included."""
        return None if self._only_input is None else (self._only_input, self._output_shapes[0])

    def _checked(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        if isinstance(inputs, Tensor) or len(inputs) != len(self._input_shapes):
            count = "one tensor" if isinstance(inputs, Tensor) else f"{len(inputs)}"
            raise ValueError(f"inputs: {count}, expected a list of {len(self._input_shapes)}")
        return [
            x if _is_plain(x, shape) else float_tensor(f"inputs[{i}]", x, shape)
            for i, (x, shape) in enumerate(zip(inputs, self._input_shapes, strict=True))
        ]

    def _run_reference(self, tensors: list[Tensor]) -> list[Tensor]:
        values: dict[int, Tensor] = {}
        with torch.no_grad():
            for port, x in zip(self._inputs, tensors, strict=True):
                values[port.value] = x.transpose(1, 2) if port.layout == "tokens" else x
            for step in self._steps:
                values[step.output] = step.layer.reference(*(values[i] for i in step.inputs))
            return [
                (y.transpose(1, 2) if port.layout == "tokens" else y).clone(
                    memory_format=torch.contiguous_format
                )
                for port in self._outputs
                for y in [values[port.value]]
            ]

    def _native_plan(self) -> Any:
        if self._native is None:  # built under reference mode
            with self._build_lock:
                if self._native is None:
                    self._native = self._build_native()
        return self._native

    def _build_native(self) -> Any:
        builder = native().PlanBuilder(self.batch)
        ids: dict[int, int] = {}
        for port in self._inputs:
            shape = self._shapes[port.value]
            vector, tokens = len(shape) == 1, port.layout == "tokens"
            ids[port.value] = builder.input(*layers.planar(shape), vector, tokens)
        for step in self._steps:
            ids[step.output] = step.layer.emit(builder, [ids[i] for i in step.inputs], step.name)
        for port in self._outputs:
            builder.output(ids[port.value], port.layout == "tokens")
        threads = self.threads or torch.get_num_threads()
        most = BANDED_THREADS if self.batch == 1 else 1
        bands = BANDS if threads <= most else (0, 0)
        return builder.build(*bands, parts=threads)


def _is_plain(x: object, shape: Shape | None) -> bool:
    """Whether a tensor can be handed over as it is; the quick way past `float_tensor`."""
    return (
        isinstance(x, Tensor)
        and x.dtype is torch.float32
        and x.shape == shape
        and x.is_cpu
        and x.is_contiguous()
        and not x.requires_grad
    )
