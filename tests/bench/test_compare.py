"""Comparisons are fair: same threads, same outputs, interleaved, and nobody missing unnamed."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from aerogel import bench
from aerogel.bench import BenchRow, BenchTable, Contender, Inputs, TorchEager, compare, lineup

QUICK: dict[str, Any] = {"rounds": 3, "sample_seconds": 1e-4}


class Sleeper:
    """An engine that takes as long as it says and gives what it is told."""

    def __init__(self, name: str, seconds: float = 0.0, scale: float = 1.0) -> None:
        self.name, self.seconds, self.scale = name, seconds, scale
        self.threads: list[int] = []

    def available(self) -> str | None:
        return None

    def prepare(self, model: nn.Module, inputs: Inputs, threads: int, workspace: Any) -> Any:
        self.threads.append(threads)

        def run() -> Tensor:
            time.sleep(self.seconds)
            assert torch.get_num_threads() == threads
            return model(*inputs.args, **inputs.kwargs) * self.scale

        return run


class Absent(Sleeper):
    def available(self) -> str | None:
        return "not installed [here]"


class Broken(Sleeper):
    def prepare(self, *_: Any) -> Any:
        raise RuntimeError("cannot\nmore")


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.Flatten(1)
    ).eval()


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 4).eval()


def test_ratios_are_those_of_the_times(net) -> None:
    entries = [Contender(Sleeper("slow", 0.006), net), Contender(Sleeper("fast", 0.002), net)]
    table = compare(entries, torch.randn(2, 4), baseline="slow (dense)", **QUICK)
    assert table.row("slow (dense)").ratio == pytest.approx(1.0)
    assert 1.2 < table.row("fast (dense)").ratio < 8  # three, on an idle machine
    assert table.ratio("slow (dense)", "fast (dense)") == table.row("fast (dense)").ratio
    assert table.fastest().label == "fast (dense)"
    for row in table.rows:
        assert row.low <= row.median <= row.high
        assert len(row.samples) == 3


def test_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    """A machine that becomes three times slower half-way does not change what is faster."""
    a = BenchRow("a", "a", samples=[1.0, 2.0, 3.0, 6.0])
    b = BenchRow("b", "b", samples=[0.5, 1.0, 1.5, 3.0])
    assert BenchTable(1, 1, 4, "a", [a, b]).ratio("a", "b") == 2.0


def test_threads_are_set_for_all_and_given_back(net) -> None:
    before = torch.get_num_threads()
    other = 1 if before > 1 else 2
    engine = Sleeper("e")
    compare([Contender(engine, net)], torch.randn(1, 4), threads=other, **QUICK)
    assert engine.threads == [other]
    assert torch.get_num_threads() == before


def test_rounds_are_interleaved_and_their_order_rotates(net) -> None:
    order: list[str] = []
    entries = {n: lambda x, n=n: (order.append(n), x)[1] for n in "ab"}
    compare(entries, torch.ones(1), rounds=4, sample_seconds=1e-9)
    tail = "".join(order)[-16:]  # 4 rounds of 2 contenders, one uncounted and one counted call
    assert tail == "aabb" + "bbaa" + "aabb" + "bbaa"


def test_missing_and_failing_engines_are_named_with_the_reason(net) -> None:
    entries = [Contender(e, net) for e in (TorchEager(), Absent("absent"), Broken("broken"))]
    table = compare(entries, torch.randn(1, 4), **QUICK)
    assert table.row("absent (dense)").missing == "not installed [here]"
    assert table.row("broken (dense)").missing == "RuntimeError: cannot"
    assert "not installed [here]" in str(table)
    assert table.baseline == "torch eager (dense)"
    with pytest.raises(ValueError, match="not installed"):
        table.ratio("torch eager (dense)", "absent (dense)")


@pytest.mark.parametrize("scale", [1.01, float("nan")])
def test_wrong_outputs_are_not_ranked(net, scale) -> None:
    entries = [Contender(TorchEager(), net), Contender(Sleeper("liar", scale=scale), net)]
    row = compare(entries, torch.randn(1, 4), **QUICK).row("liar (dense)")
    assert row.median is None
    assert "outputs are wrong" in row.missing


def test_each_network_is_checked_against_itself(net) -> None:
    """A sparse network's outputs differ from the dense one's; that is no engine's fault."""
    sparse = nn.Linear(4, 4).eval()
    table = compare(
        [Contender(Sleeper("e"), net, "dense"), Contender(Sleeper("e"), sparse, "sparse")],
        torch.randn(1, 4), **QUICK,
    )  # fmt: skip
    assert [row.missing for row in table.rows] == [None, None]
    assert [row.label for row in table.rows] == ["e (dense)", "e (sparse)"]


def test_masks_are_baked_before_anything_is_timed(net) -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 0.5

    parametrize.register_parametrization(net, "weight", Half())
    seen: list[nn.Module] = []

    class Spy(Sleeper):
        def prepare(self, model: nn.Module, *rest: Any) -> Any:
            seen.append(model)
            return super().prepare(model, *rest)

    x = torch.randn(1, 4)
    assert compare([Contender(Spy("spy"), net)], x, **QUICK).rows[0].max_error == 0
    assert not parametrize.is_parametrized(seen[0])
    assert parametrize.is_parametrized(net)
    assert torch.equal(seen[0](x), net(x))


def test_plain_callables_and_modules_can_be_compared(net) -> None:
    table = compare({"module": net, "function": lambda x: net(x)}, torch.randn(1, 4), **QUICK)
    assert [row.label for row in table.rows] == ["module", "function"]
    assert all(row.median for row in table.rows)
    assert table.baseline == "module"


@pytest.mark.parametrize("example", [
    torch.randn(3, 4), (torch.randn(3, 4),), {"input": torch.randn(3, 4)},
])  # fmt: skip
def test_inputs_may_be_a_tensor_arguments_or_keywords(net, example) -> None:
    table = compare([Contender(TorchEager(), net)], example, **QUICK)
    assert table.batch == 3
    assert table.rows[0].missing is None


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"threads": 0}, "threads=0"),
        ({"rounds": 2}, "rounds=2"),
        ({"baseline": "nobody"}, "nobody"),
    ],
)
def test_bad_arguments_are_named(net, kwargs, match) -> None:
    with pytest.raises(ValueError, match=match):
        compare([Contender(TorchEager(), net)], torch.randn(1, 4), **kwargs)
    with pytest.raises(ValueError, match="empty"):
        compare([], torch.randn(1, 4))
    with pytest.raises(TypeError, match="example_inputs"):
        compare([Contender(TorchEager(), net)], 3)


def test_the_table_is_plain_json(net) -> None:
    table = compare([Contender(TorchEager(), net), Contender(Absent("x"), net)],
                    torch.randn(1, 4), **QUICK)  # fmt: skip
    assert json.loads(json.dumps(table.to_dict()))["rows"][1]["missing"] == "not installed [here]"


def test_every_installed_engine_gives_eager_torchs_outputs() -> None:
    net = conv_net()
    sparse = conv_net()
    with torch.no_grad():
        sparse[3].weight *= torch.rand_like(sparse[3].weight) > 0.9
    table = compare(lineup(net, sparse), torch.randn(2, 3, 12, 12), threads=1, **QUICK)
    print(table)
    for row in table.rows:
        if row.missing is not None:
            assert "not installed" in row.missing or "compiler" in row.missing
        else:
            assert row.max_error < 1e-4


def test_channels_last_says_that_it_is_for_images(net) -> None:
    entries = [Contender(TorchEager(), net), Contender(bench.TorchChannelsLast(), net)]
    table = compare(entries, torch.randn(1, 4), **QUICK)
    assert "convolution" in table.rows[1].missing


def test_networks_of_several_inputs_run_everywhere() -> None:
    class Two(nn.Module):
        def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
            return {"sum": (ids * mask).sum(1), "mean": mask.float().mean(1)}

    example = {"ids": torch.arange(12).reshape(2, 6), "mask": torch.ones(2, 6, dtype=torch.int64)}
    engines = (TorchEager(), bench.OnnxRuntime(), bench.OpenVino())
    table = compare(lineup(Two(), engines=engines), example, threads=1, **QUICK)
    for row in table.rows:
        assert row.missing is None or "not installed" in row.missing


def test_file_sizes_counts_zeros_as_bits(tmp_path) -> None:
    dense = nn.Linear(256, 256)
    sparse = nn.Linear(256, 256)
    with torch.no_grad():
        sparse.weight *= torch.rand_like(sparse.weight) > 0.9
    torch.manual_seed(0)
    sizes = bench.file_sizes({"dense": dense, "sparse": sparse})
    assert sizes["dense"].file_bytes >= sizes["dense"].dense_bytes == 4 * (256 * 256 + 256)
    assert sizes["sparse"].file_bytes < 0.16 * sizes["dense"].file_bytes
    kept = int((sparse.weight != 0).sum()) + 256
    assert sizes["sparse"].nonzero == kept
    assert sizes["sparse"].elements == sizes["dense"].elements == 256 * 256 + 256


def test_hardware_is_described() -> None:
    machine = bench.hardware_info()
    assert machine.cpu
    assert machine.logical_cores >= 1
    assert machine.versions["torch"] == torch.__version__
    assert json.dumps(machine.to_dict())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.2e-7, "0.120 µs"),
        (4.4e-3, "4.40 ms"),
        (0.1234, "123 ms"),
        (0.9996, "1000 ms"),
        (12.0, "12.0 s"),
    ],
)
def test_times_read_well(seconds, text) -> None:
    assert bench.format_seconds(seconds) == text
