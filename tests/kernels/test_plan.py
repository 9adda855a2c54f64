"""Whole plans: memory reuse, batches, threads, layouts, errors, and the reference mode."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aerogel import kernels
from aerogel.kernels import BlockRowWeight, Plan, PlanBuilder, Value

needs_native = pytest.mark.skipif(not kernels.native_available(), reason="native kernels not built")
NAN = float("nan")


def sparse(rows: int, cols: int, density: float, generator: torch.Generator) -> Tensor:
    weight = torch.randn(rows, cols, generator=generator) / (cols * density) ** 0.5
    return weight * (torch.rand(rows, cols, generator=generator) < density)


class RandomGraph:
    """A small network drawn step by step; every value made so far may be used again."""

    def __init__(self, draw: st.DrawFn, batch: int) -> None:
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        self.builder = PlanBuilder(batch)
        channels, side = draw(st.integers(1, 10)), draw(st.integers(3, 18))
        self.inputs = [torch.randn(batch, channels, side, side, generator=self.generator)]
        self.values = [self.builder.input((channels, side, side))]
        for _ in range(draw(st.integers(1, 8))):
            self.values.append(self.step())
        for value in {self.values[-1], draw(st.sampled_from(self.values))}:
            self.builder.output(value)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def step(self) -> Value:
        x = self.draw(st.sampled_from(self.values[-4:]))
        kinds = ["linear", "activation", "combine"]
        if len(x.shape) == 3:
            kinds += ["conv", "depthwise", "pool", "mean", "flatten", "gate"] * 2
        return getattr(self, self.draw(st.sampled_from(kinds)))(x)

    def linear(self, x: Value) -> Value:
        rows = self.draw(st.integers(1, 12))
        weight = sparse(rows, x.shape[0], 0.5, self.generator)
        bias = self.randn(rows)
        if self.draw(st.booleans()):
            return self.builder.sparse_conv1x1(x, BlockRowWeight.pack(weight), bias, "relu")
        return self.builder.linear(x, weight, bias, "hardswish")

    def activation(self, x: Value) -> Value:
        return self.builder.activation(x, self.draw(st.sampled_from(("relu", "silu", "gelu"))))

    def combine(self, x: Value) -> Value:
        other = self.draw(st.sampled_from([v for v in self.values if v.shape == x.shape]))
        operation = self.draw(st.sampled_from((self.builder.add, self.builder.mul)))
        return operation(x, other, self.draw(st.sampled_from(("none", "relu6"))))

    def conv(self, x: Value) -> Value:
        kernel, out = self.draw(st.sampled_from((1, 3))), self.draw(st.integers(1, 10))
        weight = self.randn(out, x.shape[0], kernel, kernel) / (kernel**2 * x.shape[0]) ** 0.5
        stride = self.draw(st.integers(1, 2))
        residual = x if stride == 1 and out == x.shape[0] else None
        if self.draw(st.booleans()):
            weight = weight * (torch.rand(weight.shape, generator=self.generator) < 0.4)
            return self.builder.sparse_conv2d(
                x, BlockRowWeight.pack(weight.flatten(1)), kernel, self.randn(out), stride,
                kernel // 2, activation="relu", residual=residual,
            )  # fmt: skip
        return self.builder.conv2d(
            x, weight, self.randn(out), stride, kernel // 2, activation="relu", residual=residual
        )

    def depthwise(self, x: Value) -> Value:
        kernel, stride = self.draw(st.sampled_from((3, 5))), self.draw(st.integers(1, 2))
        weight = self.randn(x.shape[0], 1, kernel, kernel) / kernel
        return self.builder.conv2d(x, weight, None, stride, kernel // 2, 1, x.shape[0], "relu6")

    def pool(self, x: Value) -> Value:
        operation = self.draw(st.sampled_from((self.builder.max_pool2d, self.builder.avg_pool2d)))
        return operation(x, 3, 1, 1) if min(x.shape[1:]) < 3 else operation(x, 3, 2, 1)

    def mean(self, x: Value) -> Value:
        return self.builder.global_avg_pool(x)

    def flatten(self, x: Value) -> Value:
        return self.builder.flatten(x)

    def gate(self, x: Value) -> Value:
        return self.builder.mul(x, self.builder.activation(self.mean(x), "sigmoid"))


@needs_native
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), batch=st.integers(1, 5))
def test_random_graphs_equal_their_references_for_any_number_of_threads(
    data: st.DataObject, batch: int
) -> None:
    graph = RandomGraph(data.draw, batch)
    plan = graph.builder.build()
    expected = plan._run_reference(plan._checked(graph.inputs))
    first: list[Tensor] = []
    for threads in (1, 2, 3):
        plan.threads = threads
        plan.run(graph.inputs)
        plan._native_plan().fill_idle_arenas(NAN)  # nothing may survive from the run before
        outputs = plan.run(graph.inputs)
        first = first or outputs
        for got, same, wanted in zip(outputs, first, expected, strict=True):
            assert torch.equal(got, same), f"{threads} threads give other bits"
            scale = max(1.0, float(wanted.abs().max()))
            torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5 * scale)


def small_mobilenet(batch: int, threads: int | None = None) -> tuple[Plan, torch.nn.Module]:
    """MobileNetV1's layers at a quarter of the width, 90 % of the 1x1 weights zero."""
    torch.manual_seed(0)
    b = PlanBuilder(batch, threads)
    x = b.input((3, 64, 64))
    layers: list[torch.nn.Module] = []

    def conv(x: Value, layer: torch.nn.Conv2d) -> Value:
        layers.extend((layer, torch.nn.ReLU6()))
        torch.nn.init.kaiming_normal_(layer.weight)
        if layer.kernel_size == (1, 1):
            keep = torch.rand_like(layer.weight) < 0.1
            layer.weight.data.mul_(keep * 3.0)
            packed = BlockRowWeight.pack(layer.weight.detach())
            return b.sparse_conv1x1(x, packed, layer.bias, "relu6")
        return b.conv2d(
            x, layer.weight, layer.bias, layer.stride, layer.padding, 1, layer.groups, "relu6"
        )

    x = conv(x, torch.nn.Conv2d(3, 8, 3, 2, 1))
    channels = 8
    for out, stride in ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), (256, 2), (256, 1)):
        x = conv(x, torch.nn.Conv2d(channels, channels, 3, stride, 1, groups=channels))
        x = conv(x, torch.nn.Conv2d(channels, out, 1))
        channels = out
    head = torch.nn.Linear(channels, 100)
    b.output(b.linear(b.global_avg_pool(x), head.weight, head.bias))
    tail = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), head]
    return b.build(), torch.nn.Sequential(*layers, *tail).eval()


@pytest.mark.parametrize("batch", [1, 5])
@torch.no_grad()
def test_a_whole_sparse_mobilenet_equals_torch(batch: int) -> None:
    plan, network = small_mobilenet(batch)
    x = torch.randn(batch, 3, 64, 64)
    expected = network(x)
    (got,) = plan.run([x])
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@needs_native
@torch.no_grad()
def test_concurrent_runs_of_one_plan_do_not_disturb_each_other() -> None:
    plan, _ = small_mobilenet(2, threads=2)
    images = [torch.randn(2, 3, 64, 64) for _ in range(4)]
    expected = [plan.run([x])[0] for x in images]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            if not torch.equal(plan.run([images[i]])[0], expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(images))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@needs_native
def test_values_that_do_not_live_together_share_memory() -> None:
    b = PlanBuilder()
    x = b.input((8, 32, 32))
    for _ in range(10):
        x = b.conv2d(x, torch.randn(8, 1, 3, 3), None, 1, 1, 1, 8)
    b.output(x)
    one_value = 4 * 8 * 32 * 32
    assert b.build().arena_bytes < 3.5 * one_value


@needs_native
def test_an_input_may_be_an_output_and_a_value_two_outputs() -> None:
    b = PlanBuilder(2)
    x = b.input((3, 5, 5))
    y = b.activation(x, "relu")
    for value in (x, y, y):
        b.output(value)
    image = torch.randn(2, 3, 5, 5)
    same, *twice = b.build().run([image])
    assert torch.equal(same, image)
    assert all(torch.equal(t, image.relu()) for t in twice)


@needs_native
@pytest.mark.parametrize("k_blocks", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_sum_may_take_the_place_of_its_residual(kernel: int, k_blocks: int) -> None:
    generator = torch.Generator().manual_seed(kernel)
    weight = sparse(24, 24 * kernel**2, 0.2, generator)
    packed = BlockRowWeight.pack(weight)
    variant = kernels.SpmmVariant(2, 2, k_blocks, 1, True)
    filters = weight.view(24, 24, kernel, kernel)
    image = torch.randn(3, 24, 7, 9, generator=generator)
    b = PlanBuilder(batch=3, threads=2)

    def conv(x: Value, residual: Value) -> Value:
        return b.sparse_conv2d(
            x, packed, kernel, padding=kernel // 2, residual=residual, variant=variant
        )

    def pointwise(x: Value, residual: Value) -> Value:
        return b.sparse_conv1x1(x, packed, residual=residual, variant=variant)

    layer = pointwise if kernel == 1 else conv
    first = b.activation(b.input((24, 7, 9)), "relu")
    kept = layer(b.activation(first, "gelu"), first)  # its residual is needed once more
    own = layer(kept, kept)  # x itself is the residual
    b.output(layer(layer(own, own), first))
    plan = b.build()

    def expected(x: Tensor, residual: Tensor) -> Tensor:
        return F.conv2d(x, filters, padding=kernel // 2) + residual

    x = image.relu()
    y = expected(F.gelu(x), x)
    y = expected(y, y)
    y = expected(expected(y, y), x)
    (result,) = plan.run([image])
    torch.testing.assert_close(result, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))


@needs_native
@pytest.mark.parametrize("batch", [1, 2, 7, 600])
def test_vectors_of_a_batch_are_multiplied_together_or_one_by_one(batch: int) -> None:
    b = PlanBuilder(batch, threads=2)
    first, second = torch.randn(40, 30), torch.randn(7, 40)
    x = b.input((30,))
    b.output(b.linear(b.linear(x, first, activation="relu"), BlockRowWeight.pack(second)))
    vectors = torch.randn(batch, 30)
    expected = F.linear(F.linear(vectors, first).relu(), second)
    torch.testing.assert_close(b.build().run([vectors])[0], expected, rtol=1e-4, atol=1e-4)


@needs_native
def test_instruction_sets_agree() -> None:
    x, outputs, before = torch.randn(3, 3, 64, 64), [], kernels.isa()
    try:
        for isa in kernels.available_isas():
            kernels.set_isa(isa)
            outputs.append(small_mobilenet(3)[0].run([x])[0])
    finally:
        kernels.set_isa(before)
    for got in outputs[1:]:
        torch.testing.assert_close(got, outputs[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_reference_mode_runs_the_same_plan_on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 64, 64)
    native_plan, _ = small_mobilenet(2)
    (native,) = native_plan.run([x])
    monkeypatch.setenv("AEROGEL_KERNELS", "reference")
    (switched,) = native_plan.run([x])
    reference_plan, network = small_mobilenet(2)
    (reference,) = reference_plan.run([x])
    assert torch.equal(switched, reference)
    torch.testing.assert_close(reference, network(x), rtol=1e-4, atol=1e-4)
    monkeypatch.delenv("AEROGEL_KERNELS")
    if kernels.native_available():
        assert torch.equal(reference_plan.run([x])[0], native)


@needs_native
def test_profile_times_every_named_operation_and_describe_counts_its_work() -> None:
    plan, _ = small_mobilenet(1)
    rows = {row.name: row for row in plan.describe()}
    steps = dict(plan.profile([torch.randn(1, 3, 64, 64)], repeats=2))
    assert rows.keys() <= steps.keys()
    assert all(seconds >= 0 for seconds in steps.values())
    stem = rows["conv2d_0"]
    assert stem.output_shape == (8, 32, 32)
    assert stem.flops == 2 * 27 * 8 * 32 * 32
    assert stem.bytes == 4 * (3 * 64 * 64 + 8 * 32 * 32 + 8 * 27 + 8)


def test_weights_may_change_after_the_plan_was_built() -> None:
    if not kernels.native_available() or kernels.reference_mode():
        pytest.skip("references read the caller's tensors")
    weight, x = torch.randn(5, 4, 3, 3), torch.randn(1, 4, 6, 6)
    b = PlanBuilder()
    b.output(b.conv2d(b.input((4, 6, 6)), weight))
    plan = b.build()
    (before,) = plan.run([x])
    weight.zero_()
    assert torch.equal(plan.run([x])[0], before)


def test_inputs_of_any_stride_are_taken_and_gradients_are_not_recorded() -> None:
    b = PlanBuilder(2)
    b.output(b.activation(b.input((3, 4, 4)), "relu"))
    x = torch.randn(2, 4, 4, 3).permute(0, 3, 1, 2).requires_grad_()
    (y,) = b.build().run([x])
    assert torch.equal(y, x.detach().relu())
    assert not y.requires_grad


BAD_LAYERS = {
    "weight: shape": lambda b, x: b.conv2d(x, torch.randn(4, 5, 3, 3)),
    "groups=2": lambda b, x: b.conv2d(x, torch.randn(4, 3, 3, 3), groups=2),
    "bias: shape": lambda b, x: b.conv2d(x, torch.randn(4, 3, 3, 3), torch.randn(5)),
    "too large": lambda b, x: b.conv2d(x, torch.randn(4, 3, 9, 9)),
    "stride=0": lambda b, x: b.conv2d(x, torch.randn(4, 3, 3, 3), stride=0),
    "padding": lambda b, x: b.max_pool2d(x, 2, padding=2),
    "did you mean 'relu'": lambda b, x: b.activation(x, "rellu"),
    "flatten it first": lambda b, x: b.linear(x, torch.randn(4, 75)),
    "residual: shape": lambda b, x: b.conv2d(x, torch.randn(4, 3, 1, 1), residual=x),
    "y: shape": lambda b, x: b.add(x, b.max_pool2d(x, 2)),
    "expected a vector": lambda b, x: b.reshape(x, (5, 15, 1)),
    "another builder": lambda b, x: b.activation(PlanBuilder().input((3, 5, 5)), "relu"),
    "stem: ": lambda b, x: b.conv2d(x, torch.randn(4, 5, 3, 3), name="stem"),
}


@pytest.mark.parametrize("message", BAD_LAYERS)
def test_a_layer_that_does_not_fit_is_refused_with_its_name(message: str) -> None:
    b = PlanBuilder()
    x = b.input((3, 5, 5))
    with pytest.raises(ValueError, match=message):
        BAD_LAYERS[message](b, x)


def test_other_dtypes_and_objects_are_refused() -> None:
    b = PlanBuilder()
    x = b.input((3, 5, 5))
    with pytest.raises(TypeError, match="float64"):
        b.conv2d(x, torch.randn(4, 3, 1, 1, dtype=torch.float64))
    with pytest.raises(TypeError, match="BlockRowWeight"):
        b.sparse_conv1x1(x, torch.randn(4, 3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="value of this builder"):
        b.activation(torch.randn(3), "relu")  # type: ignore[arg-type]


def test_run_names_the_tensor_that_does_not_fit() -> None:
    b = PlanBuilder(2)
    b.output(b.activation(b.input((3, 5, 5)), "relu"))
    plan = b.build()
    with pytest.raises(ValueError, match=r"inputs\[0\]: shape \(1, 3, 5, 5\)"):
        plan.run([torch.randn(1, 3, 5, 5)])
    with pytest.raises(ValueError, match="expected a list of 1"):
        plan.run([])
    with pytest.raises(ValueError, match="expected a list of 1"):
        plan.run(torch.randn(2, 3, 5, 5))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="float16"):
        plan.run([torch.randn(2, 3, 5, 5, dtype=torch.float16)])


def test_a_plan_needs_an_output_and_sensible_numbers() -> None:
    with pytest.raises(ValueError, match="outputs"):
        PlanBuilder().build()
    with pytest.raises(ValueError, match="batch=0"):
        PlanBuilder(0)
    with pytest.raises(ValueError, match="threads=0"):
        PlanBuilder(threads=0)
    with pytest.raises(ValueError, match="layout='nhwc'"):
        PlanBuilder().input((3, 5, 5), layout="nhwc")
    with pytest.raises(ValueError, match=r"\(T, F\)"):
        PlanBuilder().input((3, 5, 5), layout="tokens")


def test_an_arena_of_several_huge_pages_is_like_any_other() -> None:
    weight, x = torch.randn(48, 32, 1, 1), torch.randn(2, 32, 160, 150)
    b = PlanBuilder(2)
    b.output(b.max_pool2d(b.conv2d(b.input((32, 160, 150)), weight, activation="relu"), 2, 2))
    plan = b.build()
    assert plan.arena_bytes > 4 << 20
    expected = F.max_pool2d(F.conv2d(x, weight).relu(), 2, 2)
    for _ in range(2):
        torch.testing.assert_close(plan.run([x])[0], expected, rtol=1e-4, atol=1e-4)
        plan._native_plan().fill_idle_arenas(float("nan"))
