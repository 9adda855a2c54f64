"""Calling a compiled model: other shapes, threads, wrong inputs, copies."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fakes import build_with
from torch import Tensor, nn

import aerogel
from aerogel import kernels
from aerogel.runtime import compiled as compiled_module
from aerogel.runtime.strategies import CALLS, PLANS
from networks import mobile_network, perceptron


def expect(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return perceptron()


@pytest.mark.parametrize("strategy", [CALLS, PLANS])
def test_other_batch_sizes_are_planned_and_kept(model: nn.Module, strategy: str) -> None:
    compiled = build_with(model, torch.randn(4, 24), strategy=strategy)
    for batch in (1, 9, 4, 1):
        x = torch.randn(batch, 24)
        torch.testing.assert_close(compiled(x), expect(model, x), rtol=1e-4, atol=1e-5)
    assert len(compiled._programs) == 3
    assert compiled.explain().inputs == "(float32 (4, 24))"
    assert compiled.prepare(torch.randn(9, 24)).inputs == "(float32 (9, 24))"


def test_the_least_recently_used_shape_is_dropped(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_module, "MAX_PROGRAMS", 2)
    compiled = build_with(model, torch.randn(4, 24), strategy=CALLS)
    compiled(torch.randn(2, 24))
    compiled(torch.randn(4, 24))
    compiled(torch.randn(3, 24))
    assert [key[0][0][0] for key in compiled._programs] == [4, 3]


def test_images_of_another_size_are_planned() -> None:
    model = mobile_network()
    compiled = build_with(model, torch.randn(1, 3, 20, 20), strategy=PLANS)
    x = torch.randn(2, 3, 17, 30)
    torch.testing.assert_close(compiled(x), expect(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("strategy", [CALLS, PLANS])
def test_concurrent_calls_do_not_disturb_each_other(strategy: str, threads: int) -> None:
    model = mobile_network()
    example = torch.randn(1, 3, 20, 20)
    compiled = build_with(model, example, strategy=strategy, threads=threads)
    inputs = [torch.randn(1 + i % 2, 3, 20, 20) for i in range(24)]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(compiled, inputs))
    for x, y in zip(inputs, results, strict=True):
        torch.testing.assert_close(y, expect(model, x), rtol=1e-4, atol=1e-5)


def test_results_are_fresh_tensors(model: nn.Module) -> None:
    x = torch.randn(4, 24)
    compiled = build_with(model, x, strategy=PLANS)
    first = compiled(x)
    kept = first.clone()
    compiled(torch.randn(4, 24))
    assert torch.equal(first, kept)


def test_inputs_of_any_strides_are_taken() -> None:
    model = mobile_network()
    x = torch.randn(2, 3, 20, 20)
    compiled = build_with(model, x, strategy=PLANS)
    expected = expect(model, x)
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(compiled(last), expected, rtol=1e-4, atol=1e-5)
    wide = torch.randn(2, 3, 20, 40)[..., ::2].copy_(x)
    torch.testing.assert_close(compiled(wide), expected, rtol=1e-4, atol=1e-5)


def test_positional_and_keyword_calls_share_a_plan(model: nn.Module) -> None:
    x = torch.randn(4, 24)
    compiled = build_with(model, x, strategy=CALLS)
    assert torch.equal(compiled(input=x), compiled(x))
    assert len(compiled._programs) == 1


def test_wrong_inputs_are_named(model: nn.Module) -> None:
    compiled = build_with(model, torch.randn(4, 24))
    with pytest.raises(ValueError, match=r"'input' has shape \(24,\), expected 2 dim.*\(4, 24\)"):
        compiled(torch.randn(24))
    with pytest.raises(TypeError, match=r"'input' is float64 \(4, 24\), expected float32"):
        compiled(torch.randn(4, 24).double())
    with pytest.raises(ValueError, match=r"fails on .*float32 \(4, 23\)"):
        compiled(torch.randn(4, 23))
    with pytest.raises(ValueError, match=r"do not fit Sequential\.forward"):
        compiled()


@pytest.mark.parametrize("bad", [(), (torch.randn(4, 24), 1), 3, {"y": torch.randn(4, 24)}])
def test_wrong_examples_are_refused(model: nn.Module, bad: object) -> None:
    with pytest.raises(ValueError, match=r"example_inputs"):
        aerogel.compile(model, bad)


def test_wrong_arguments_are_refused(model: nn.Module) -> None:
    x = torch.randn(4, 24)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        aerogel.compile(lambda y: y, x)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        aerogel.compile(model, x, threads=0)
    with pytest.raises(ValueError, match="tolerance must be positive"):
        aerogel.compile(model, x, tolerance=0.0)
    with pytest.raises(ValueError, match="'magic' is not available"):
        build_with(model, x, strategy="magic")


def test_gradients_are_refused_and_outputs_detached(model: nn.Module) -> None:
    x = torch.randn(4, 24, requires_grad=True)
    compiled = build_with(model, x.detach(), strategy=CALLS)
    with pytest.raises(RuntimeError, match="'input' requires a gradient"):
        compiled(x)
    with torch.no_grad():
        assert not compiled(x).requires_grad
    assert not compiled(x.detach()).requires_grad


def test_training_moving_and_loading_are_refused(model: nn.Module) -> None:
    compiled = build_with(model, torch.randn(4, 24))
    assert not compiled.eval().training
    with pytest.raises(RuntimeError, match="for inference"):
        compiled.train()
    with pytest.raises(RuntimeError, match="cannot move"):
        compiled.double()
    assert compiled.cpu() is compiled
    with pytest.raises(RuntimeError, match=r"aerogel\.compile again"):
        compiled.load_state_dict({})
    with pytest.raises(TypeError, match=r"aerogel\.save"):
        pickle.dumps(compiled)


def test_copies_share_plans_and_agree(model: nn.Module) -> None:
    x = torch.randn(4, 24)
    compiled = build_with(model, x, strategy=PLANS)
    for twin in (copy.copy(compiled), copy.deepcopy(compiled)):
        assert torch.equal(twin(x), compiled(x))


def test_compiling_again_starts_from_the_original(model: nn.Module) -> None:
    x = torch.randn(4, 24)
    again = aerogel.compile(build_with(model, x, strategy=PLANS), x, threads=1, cache=False)
    assert not isinstance(again.original, type(again))
    torch.testing.assert_close(again(x), expect(model, x), rtol=1e-4, atol=1e-5)


def test_it_can_be_part_of_another_model(model: nn.Module) -> None:
    x = torch.randn(4, 24)
    whole = nn.Sequential(build_with(model, x, strategy=PLANS), nn.Softmax(-1))
    torch.testing.assert_close(whole(x), expect(model, x).softmax(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:aerogel's kernels run on the CPU")
@pytest.mark.parametrize("strategy", [CALLS, PLANS])
def test_inputs_that_lie_elsewhere_are_named(model: nn.Module, strategy: str) -> None:
    compiled = build_with(model, torch.randn(4, 24), strategy=strategy)
    for batch in (4, 5):  # a shape that is planned, and a new one
        with pytest.raises(ValueError, match="'input' is on meta, expected it on the CPU"):
            compiled(torch.empty(batch, 24, device="meta"))
    with pytest.raises(TypeError, match=r"'input' is torch\.sparse_coo, expected torch\.strided"):
        compiled(torch.randn(4, 24).to_sparse())
    with pytest.raises(TypeError, match="'input' is ndarray, expected float32"):
        compiled(torch.randn(4, 24).numpy())


class Scaled(nn.Module):
    """A layer whose output's dtype depends on the type of a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 24)

    def forward(self, x: Tensor, factor: object) -> tuple[Tensor, Tensor]:
        return self.layer(x.float()), x * factor


def test_numbers_of_another_type_are_other_inputs() -> None:
    model, x = Scaled(), torch.arange(48).view(2, 24)
    compiled = build_with(model, x, 1, strategy=CALLS)
    for factor in (1, 1.0, True):
        assert compiled(x, factor)[1].dtype == (x * factor).dtype


class Box:
    """An input that torch.export does not know."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __rmul__(self, x: Tensor) -> Tensor:
        return x * self.value


@pytest.mark.filterwarnings("ignore:torch.export fails")
def test_objects_that_cannot_be_captured_are_not_planned_for_one_by_one() -> None:
    model, x = Scaled(), torch.randn(2, 24)
    compiled = build_with(model, x, Box(1.0))
    for value in (2.0, 3.0):
        torch.testing.assert_close(compiled(x, Box(value))[1], x * value)
    assert len(compiled._programs) == 1


@pytest.mark.parametrize("strategy", [CALLS, PLANS])
def test_autocast_changes_nothing(model: nn.Module, strategy: str) -> None:
    x = torch.randn(4, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = build_with(model, x, strategy=strategy)
        result = compiled(x)
    torch.testing.assert_close(result, expect(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", [CALLS, PLANS])
def test_torchs_default_dtype_and_device_do_not_matter(model: nn.Module, strategy: str) -> None:
    compiled = build_with(model, torch.randn(4, 24), strategy=strategy)
    inputs = torch.randn(4, 24), torch.randn(5, 24)
    wanted = [expect(model, x) for x in inputs]
    torch.set_default_dtype(torch.bfloat16)
    try:
        results = [compiled(x) for x in inputs]
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        results += [compiled(inputs[0])]
    for result, expected in zip(results, [*wanted, wanted[0]], strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")
def test_only_a_plain_tensor_is_run_in_few_steps(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[torch.Size, bool]] = []
    run_plain = kernels.Plan.run_plain

    def recorded(plan: kernels.Plan, x: Tensor) -> Tensor | None:
        y = run_plain(plan, x)
        taken.append((x.shape, y is not None))
        return y

    monkeypatch.setattr(kernels.Plan, "run_plain", recorded)
    example = torch.randn(4, 24)
    compiled = build_with(model, example, strategy=PLANS)
    others = [torch.randn(5, 24), torch.randn(24, 4).t(), nn.Parameter(example, False)]
    for x in (example, *others, example):
        y = compiled(x)
        torch.testing.assert_close(y, expect(model, x), rtol=1e-4, atol=1e-5)
        assert not y.requires_grad
    assert [done for _, done in taken] == [True, False, False, False, True]
    with pytest.raises(RuntimeError, match="requires a gradient"):
        compiled(example.clone().requires_grad_())
    monkeypatch.setenv("AEROGEL_KERNELS", "reference")
    torch.testing.assert_close(compiled(example), expect(model, example), rtol=1e-4, atol=1e-5)
    assert taken[-1] == (example.shape, False)


class Tokens(nn.Module):
    """Two layers over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("shape", [(0, 3, 24), (2, 0, 24)])
def test_nothing_at_all_can_be_computed(shape: tuple[int, ...]) -> None:
    model = Tokens()
    compiled = build_with(model, torch.randn(2, 3, 24))
    assert compiled(torch.randn(shape)).shape == shape
    assert aerogel.compile(model, torch.randn(shape))(torch.randn(2, 3, 24)).shape == (2, 3, 24)
