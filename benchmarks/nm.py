"""N:M weights against dense torch: linear layers of transformers, and decoding from memory.

    python benchmarks/nm.py [--quick] [--json] [--threads N] [--check] [--save]

Of every M inputs of an output N are kept, those of largest magnitude. For many tokens `spmm` takes
the weight and its fastest variant competes; for one vector `gemv` streams it with indices of 2 or 3
bits, in float32, bfloat16 and int8. The peer is dense float32 `F.linear`; see harness.py.

A training step of BDWP (arXiv 2309.13015) is forward, both gradients and the choice of both masks
of one layer: sparse products against the same products of the masked dense weight. "select + pack"
is what the sparse step spends beside its products: both masks and both packed forms, against one
dense product of the layer and against the three that a dense step has. At most a tenth of the three
is asked. Its limit is that of bytes: as many as it reads and writes (the weight once, masks and
packed forms once), copied and filled by torch in the same turns, wherever caches hold them.

The vector meets weights that come from memory: each call takes the next of several copies,
together far larger than the last cache. The limit beside a ratio is that of multiply-adds for many
tokens and that of bytes for one: what our call must do, at the ceiling measured in the same
process, against what the dense call took.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import harness
from aerogel import kernels
from aerogel.kernels.nm import native_nm_weight
from aerogel.sparsity import NM, Bidirectional, select_parameters
from harness import Call, Column, Contest, Figure, Findings, Setup

Pattern = tuple[int, int]

# (outputs, inputs, tokens): feed-forward layers of BERT-base and of ViT-S.
MATRICES = ((3072, 768, 128), (768, 3072, 128), (3072, 768, 1024), (1536, 384, 200))
QUICK_MATRICES = MATRICES[:2]
# (outputs, inputs): the second feed-forward layer of a Llama of 7 billion weights.
VECTOR = (4096, 11008)
COPIES_BYTES = 192 << 20  # what all copies of a weight take together, at least
# (outputs, inputs, tokens) of training steps.
STEPS = tuple((*shape, tokens) for shape in ((768, 3072), (3072, 768), (1024, 1024))
              for tokens in (128, 256, 512, 2048))  # fmt: skip
QUICK_STEPS = (STEPS[0], STEPS[-3])
MOST_BESIDE = 0.1  # of the three dense products: select + pack
STEP_PATTERNS: tuple[Pattern, ...] = ((2, 8), (1, 8))
WARM_UP = 30  # steps: more than variants times tries
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
PATTERNS: tuple[Pattern, ...] = ((2, 4), (1, 4), (2, 8), (1, 8))
# (must, aim) on one thread, x dense float32: geometric mean over the layers, and one vector.
MATRIX_BOUNDS = {(2, 4): (1.1, 1.4), (1, 4): (2.1, 2.8)}
VECTOR_BOUNDS = {
    ((2, 4), torch.float32): (1.35, 1.75),
    ((2, 4), torch.bfloat16): (2.6, 3.3),
    ((2, 4), torch.int8): (4.3, 5.8),
}

COLUMNS = (
    Column("layer", "layer"),
    Column("pattern", "pattern"),
    Column("values", "values"),
    Column("dense_us", "dense us", ".0f"),
    Column("ours_us", "ours us", ".0f"),
    Column("times_dense", "x dense", ".2f"),
    Column("limit", "x limit", ".1f"),
    Column("bound", "limit is"),
    Column("variant", "V G K T pack"),
)


@dataclass(frozen=True)
class Row:
    """One layer with one pattern; times in microseconds."""

    layer: str
    pattern: str
    values: str
    dense_us: float
    ours_us: float
    times_dense: float
    limit: float
    bound: str
    variant: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A layer's contest, and the least that ours has to do."""

    layer: str
    pattern: Pattern
    dtype: torch.dtype
    contest: Contest
    operations: int
    read_bytes: int  # from memory; 0 where the weight stays in a cache

    @property
    def one_vector(self) -> bool:
        return self.read_bytes > 0

    def row(self, roof: kernels.Roofline) -> Row:
        contest = self.contest
        least = 1e-9 * self.operations / roof.fma_gflops
        if self.one_vector:
            least = 1e-9 * self.read_bytes / roof.load_gbps_dram
        return Row(
            layer=self.layer,
            pattern=name_of(self.pattern),
            values=str(self.dtype).removeprefix("torch."),
            dense_us=1e6 * contest.seconds("linear"),
            ours_us=1e6 * contest.seconds(),
            times_dense=contest.times_faster("linear"),
            limit=contest.seconds("linear") / least,
            bound="bytes" if self.one_vector else "multiply-adds",
            variant=contest.variant,
        )


def name_of(pattern: Pattern) -> str:
    return f"{pattern[0]}:{pattern[1]}"


def kept(dense: Tensor, pattern: Pattern) -> Tensor:
    """The n inputs of largest magnitude in every m."""
    n, m = pattern
    groups = dense.unflatten(1, (-1, m))
    mask = torch.zeros_like(groups).scatter(2, groups.abs().topk(n, 2).indices, 1.0)
    return (groups * mask).flatten(1)


def matrix(rows: int, cols: int, tokens: int, pattern: Pattern) -> Case:
    dense, bias, x = torch.randn(rows, cols), torch.randn(rows), torch.randn(tokens, cols)
    packed = kernels.BlockRowWeight.pack(kept(dense, pattern), 1)

    def call(variant: kernels.SpmmVariant) -> Call:
        own = packed.without_cache()
        return lambda: kernels.spmm(x, own, bias, layout="tokens", variant=variant)

    variants = {tuple(v): call(v) for v in kernels.spmm_variants(packed, tokens, "tokens")}
    return Case(
        layer=f"{cols} -> {rows} x {tokens} tokens",
        pattern=pattern,
        dtype=torch.float32,
        contest=Contest({"linear": lambda: F.linear(x, dense, bias)}, variants),
        operations=2 * packed.values.numel() * tokens,
        read_bytes=0,
    )


def in_turn(calls: list[Call]) -> Call:
    """Each call runs the next of these."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def vector(dense: Tensor, bias: Tensor, pattern: Pattern, dtype: torch.dtype) -> Case:
    x = torch.randn(1, dense.shape[1])
    packed = kernels.BlockRowWeight.pack(kept(dense, pattern), 1, dtype=dtype)
    nbytes = native_nm_weight(packed, *pattern).nbytes
    copies = [packed.without_cache() for _ in range(math.ceil(COPIES_BYTES / nbytes))]

    def call(weight: kernels.BlockRowWeight) -> Call:
        kernels.gemv(x, weight, bias)  # makes the native stream
        return lambda: kernels.gemv(x, weight, bias)

    ours = in_turn([call(weight) for weight in copies])
    return Case(
        layer=f"{dense.shape[1]} -> {dense.shape[0]}, one vector",
        pattern=pattern,
        dtype=dtype,
        contest=Contest({"linear": lambda: F.linear(x, dense, bias), harness.OURS: ours}),
        operations=2 * packed.values.numel(),
        read_bytes=nbytes,
    )


class Step:
    """One training step of a bidirectional layer, whole and in parts."""

    def __init__(self, rows: int, cols: int, tokens: int, pattern: Pattern) -> None:
        self.shape, self.tokens, self.pattern = (rows, cols), tokens, pattern
        self._layer = f"{cols} -> {rows} x {tokens} tokens"
        self.x = torch.randn(tokens, cols, requires_grad=True)
        self.gradient = torch.randn(tokens, rows)
        self.dense = nn.Linear(cols, rows)
        self.sparse, self.masked = (copy.deepcopy(self.dense) for _ in range(2))
        self.coupling = Bidirectional(NM(*pattern, axis=0))
        self.refs = {}
        for layer in (self.sparse, self.masked):
            self.refs[layer] = ref = select_parameters(layer)["weight"]
            self.coupling.attach(ref, NM(*pattern).select_largest(layer.weight))
        self.masked.products = None
        self.contest = Contest({
            "linear": lambda: F.linear(self.x, self.dense.weight, self.dense.bias),
            "products": lambda: self._products(self.dense),
            "masked": lambda: self._step(self.masked),
            harness.OURS: lambda: self._step(self.sparse),
            "select + pack": lambda: self._select(self.sparse),
            "bytes": self._bytes(),
        })  # fmt: skip
        for _ in range(WARM_UP):
            self._step(self.sparse)

    def _products(self, layer: nn.Module) -> None:
        with torch.enable_grad():
            torch.autograd.grad(layer(self.x), (self.x, layer.weight), self.gradient)

    def _step(self, layer: nn.Module) -> None:
        self._products(layer)
        self._select(layer)

    def _select(self, layer: nn.Module) -> None:
        """What a step's end does, as the trainers do it; packs where there are products."""
        ref, weight = self.refs[layer], layer.weight.detach()
        chosen = self.coupling.select_largest(ref, weight, NM(*self.pattern))
        if chosen is not layer.mask_forward:
            layer.mask_forward.copy_(chosen)
        self.coupling.masks_changed(ref, weight)

    def _bytes(self) -> Call:
        """Reads and writes as many bytes as select + pack, and does nothing else."""
        n, m = self.pattern
        weight = self.sparse.weight.detach()
        # Of both ways a byte of mask for each weight, and 8 for each that is kept.
        written = torch.empty(2 * weight.numel() * (m + 8 * n) // m, dtype=torch.uint8)
        copied = written[: weight.nbytes].view(torch.float32).view(weight.shape)
        rest = written[weight.nbytes :]

        def call() -> None:
            copied.copy_(weight)
            rest.zero_()

        return call

    def _beside(self) -> list[Figure]:
        """Shares of dense products that select + pack takes, each with its limit."""
        name = f"{name_of(self.pattern)} select + pack, both ways, {self._layer}"
        found, times = [], self.contest.times
        for peer, unit in (("linear", "of one dense product"), ("products", "of the three")):
            share = 1 / harness.ratio(times[peer], times["select + pack"])
            limit = 1 / harness.ratio(times[peer], times["bytes"])
            most = MOST_BESIDE if peer == "products" else None
            found.append(Figure(name, share, unit, most=most, limit=limit))
        return found

    def found(self, roof: kernels.Roofline) -> tuple[Row, list[Figure]]:
        contest, (n, m) = self.contest, self.pattern
        operations = 2 * self.tokens * math.prod(self.shape) * (1 + 2 * n / m)
        name = self._layer
        masked = contest.seconds("masked")
        row = Row(
            layer=f"{name}, training step",
            pattern=name_of(self.pattern),
            values="float32",
            dense_us=1e6 * masked,
            ours_us=1e6 * contest.seconds(),
            times_dense=contest.times_faster("masked"),
            limit=masked / (1e-9 * operations / roof.fma_gflops),
            bound="multiply-adds",
            variant=(),
        )
        label = f"{row.pattern} training step, {name}"
        figures = [
            Figure(label, row.times_dense, "x the same step on masked dense weights"),
            Figure(label, contest.times_faster("products"), "x the three dense products"),
        ]
        return row, figures + self._beside()


def figures(cases: list[Case], rows: list[Row]) -> list[Figure]:
    """Many tokens as geometric means by pattern, one vector row by row."""
    found = []
    pairs = list(zip(cases, rows, strict=True))
    unit = "x dense float32 F.linear"
    for pattern in PATTERNS:
        ratios = [r.times_dense for c, r in pairs if c.pattern == pattern and not c.one_vector]
        if ratios:
            name = f"{name_of(pattern)}, at least 128 tokens, geometric mean"
            bounds = MATRIX_BOUNDS.get(pattern, (None, None))
            found.append(Figure(name, statistics.geometric_mean(ratios), unit, *bounds))
    for case, row in pairs:
        if case.one_vector:
            name = f"{row.pattern} {row.values}, one vector, weights from memory"
            bounds = VECTOR_BOUNDS.get((case.pattern, case.dtype), (None, None))
            found.append(Figure(name, row.times_dense, unit, *bounds))
    return found


def makers(quick: bool) -> list[Callable[[], Case]]:
    """What is measured; one at a time, since the copies of one vector's weight fill much memory."""
    patterns = PATTERNS[:2] if quick else PATTERNS
    shapes = QUICK_MATRICES if quick else MATRICES
    dense, bias = torch.randn(VECTOR), torch.randn(VECTOR[0])
    made: list[Callable[[], Case]] = []
    for shape, pattern in itertools.product(shapes, patterns):
        made.append(lambda shape=shape, pattern=pattern: matrix(*shape, pattern))
    for pattern, dtype in itertools.product(PATTERNS[:1] if quick else patterns, DTYPES):
        made.append(lambda pattern=pattern, dtype=dtype: vector(dense, bias, pattern, dtype))
    return made


def measure(setup: Setup) -> Findings:
    cases, rows = [], []
    with torch.inference_mode():
        for make in makers(setup.quick):
            case = make()
            # Taken anew: on a shared machine the bandwidth of memory changes by the minute.
            roof = kernels.roofline(setup.threads, seconds=0.05)
            harness.hold([case.contest], setup)
            rows.append(case.row(roof))
            case.contest.calls.clear()  # frees the weights
            cases.append(case)
    found = figures(cases, rows)
    for pattern, shape in itertools.product(STEP_PATTERNS, QUICK_STEPS if setup.quick else STEPS):
        step = Step(*shape, pattern)
        harness.hold([step.contest], setup)
        row, parts = step.found(setup.roof)
        rows.append(row)
        found += parts
    return Findings(COLUMNS, rows, found)


if __name__ == "__main__":
    sys.exit(harness.run(__doc__, measure, rounds=5))
