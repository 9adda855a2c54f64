"""`aerogel.compile`: capture, simplify, measure, replace, check, and keep the fastest."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from aerogel import kernels
from aerogel.runtime import module_calls
from aerogel.runtime.calls import CallPattern, describe, normalize_example, run_example
from aerogel.runtime.candidates import Candidate
from aerogel.runtime.candidates.torch_dense import NAME as TORCH_LAYER
from aerogel.runtime.capture import Captured, CaptureError, capture, frozen_copy
from aerogel.runtime.compiled import CompiledModule, Program
from aerogel.runtime.explain import Explanation, LayerRow
from aerogel.runtime.layer import is_layer, read_layer
from aerogel.runtime.limits import bound_of
from aerogel.runtime.native import PlanModule
from aerogel.runtime.passes import simplify
from aerogel.runtime.strategies import EAGER, Contender, Strategist, fastest, flaw_of
from aerogel.runtime.timing import Measure, Race, measure, race
from aerogel.runtime.tuner import Progress, Tuned, Tuner
from aerogel.runtime.tuning_cache import TuningCache, default_path, environment

_SECONDS_END_TO_END = 3.0
# torch.export and the thread setting are global to the process.
_COMPILING = threading.RLock()


# (simplified graph, its measured layers) -> more contenders, and notes for the explanation
Extension = Callable[[fx.GraphModule, Mapping[fx.Node, Tuned]], tuple[list[Contender], list[str]]]


@dataclass(frozen=True)
class Settings:
    """How to compile.

    Attributes:
        threads: Of every kernel; None follows torch's setting at every call.
        tolerance: Largest deviation of any output, relative to its largest magnitude.
        cache_path: The tuning cache's file, or None.
        strategy: "fastest", or the name of the contender to keep even if it is slower.
        on_progress: Called with (layer name, layers done, layers in all).
        extension: Adds contenders of its own, if any.
        measure: Times whole models and segments; a fake one in tests.
        race: Times the candidates of a layer, likewise.
    """

    threads: int | None = None
    tolerance: float = 1e-4
    cache_path: Path | None = None
    strategy: str = "fastest"
    on_progress: Progress | None = None
    extension: Extension | None = None
    measure: Measure = field(default=measure)
    race: Race = field(default=race)

    def open_cache(self) -> TuningCache:
        """What was measured before under the same conditions."""
        return TuningCache(
            self.cache_path, environment(torch.get_num_threads(), kernels.isa_in_use())
        )


def compile(
    model: nn.Module | str | os.PathLike[str],
    example_inputs: Any,
    *,
    threads: int | None = None,
    tolerance: float = 1e-4,
    cache: bool = True,
    strategy: str = "fastest",
    on_progress: Progress | None = None,
) -> CompiledModule:
    """Compile a model with zeros in its weights into a faster one with the same outputs.

    Every layer is timed as dense torch and as each sparse kernel that its zeros admit, on the
    example's shapes; then whole models put together from the winners are timed against the
    original, and the fastest is kept. The original itself is among them: the result is never
    slower than what was given, on the example and as far as timing can tell.

    A model that `torch.export` cannot capture is compiled module by module instead: its
    `nn.Linear` and 1x1 `nn.Conv2d` are replaced where that is faster (a warning says why).

    Args:
        model: Any module on the CPU. Its masks (parametrizations, `torch.nn.utils.prune`) are
            baked into a copy; the model itself is left alone. Or the path of an .onnx file (see
            `from_onnx`).
        example_inputs: One tensor, a tuple of positional inputs, or a dict of keyword inputs.
        threads: Of the kernels; by default they follow `torch.get_num_threads()` at every call,
            as all that stays in torch does.
        tolerance: Largest deviation of any output, relative to its largest magnitude. What
            deviates more is not used, and `explain()` says so.
        cache: Keep measurements in `$AEROGEL_CACHE/tuning.json` (or `~/.cache/aerogel`).
        strategy: "fastest", or one contender by name ("fused torch", "layer calls", "native
            plans", "measured pieces") to use it even if it is slower.
        on_progress: Called with (layer name, layers done, layers in all) while measuring.

    Returns:
        A `CompiledModule`.

    Raises:
        ValueError: The example does not fit the model, the model is not on the CPU, or an
            argument is out of range, or the file is not one that `from_onnx` can read.
        TypeError: `model` is neither a module nor a path, or `threads` is no int.
    """
    if isinstance(model, str | os.PathLike):
        model = _load(Path(model))
    check_arguments(model, threads, tolerance)
    args, kwargs = normalize_example(example_inputs)
    original = frozen_copy(model.original if isinstance(model, CompiledModule) else model)
    settings = Settings(
        threads=threads,
        tolerance=tolerance,
        cache_path=default_path() if cache else None,
        strategy=strategy,
        on_progress=on_progress,
    )
    return build(original, args, kwargs, settings)


def build(
    original: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], settings: Settings
) -> CompiledModule:
    """Compile an already frozen model with explicit settings."""

    def plan(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        with (
            _COMPILING,
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            _torch_threads(settings.threads),
        ):
            return _plan(original, args, kwargs, settings)

    pattern = CallPattern(original, args, kwargs)
    compiled = CompiledModule(original, pattern, plan)
    compiled.prepare(*args, **kwargs)
    return compiled


def _load(path: Path) -> nn.Module:
    from aerogel.runtime.exchange.onnx_import import from_onnx

    if path.suffix != ".onnx":
        raise ValueError(f"model = {str(path)!r}: expected a module or the path of an .onnx file")
    return from_onnx(path)


def check_arguments(model: object, threads: int | None, tolerance: float) -> None:
    """Refuse what cannot be compiled; warn of weights that are not finite."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if threads is not None and type(threads) is not int:
        raise TypeError(f"threads must be an int or None, got {threads!r}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type != "cpu":
            raise ValueError(f"model must be on the CPU, but {name!r} is on {tensor.device}")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            warnings.warn(f"{name!r} holds NaN or infinity; it is kept as it is", stacklevel=3)


@contextmanager
def _torch_threads(count: int | None) -> Iterator[None]:
    """Measure torch with as many threads as the kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _plan(
    original: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], settings: Settings
) -> Program:
    expected = run_example(original, args, kwargs)
    try:
        captured = capture(original, args, kwargs)
    except CaptureError as error:
        return _plan_by_module(original, args, kwargs, expected, settings, str(error))
    return _plan_by_graph(original, args, kwargs, expected, captured, settings)


def _plan_by_graph(
    original: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    expected: Any,
    captured: Captured,
    settings: Settings,
) -> Program:
    fused = simplify(captured.graph_module)
    cache = settings.open_cache()
    tuner = Tuner(settings.threads, cache, settings.race)
    tuned = _tune(fused, tuner, settings.on_progress)
    leaves = pytree.tree_leaves((args, kwargs))
    strategist = Strategist(
        fused,
        tuned,
        leaves,
        threads=settings.threads,
        tolerance=settings.tolerance,
        measure=settings.measure,
        race=settings.race,
        cache=cache,
    )
    contenders = strategist.contenders()
    notes = tuner.notes + strategist.notes
    if settings.extension is not None:
        more, said = settings.extension(fused, tuned)
        contenders, notes = contenders + more, notes + said
    runs = {EAGER: lambda: original(*args, **kwargs)}
    runs |= {
        each.name: partial(each.run, *leaves)
        for each in _accepted(contenders, leaves, expected, settings, notes)
    }
    seconds, winner = _choose(runs, settings)
    chosen = next((each for each in contenders if each.name == winner), Contender(EAGER, original))
    for piece in chosen.pieces:
        if isinstance(piece.module, PlanModule):
            piece.module.plan.adapt()
    explanation = Explanation(
        rows=_rows(tuned, chosen, seconds[winner]),
        strategies=seconds,
        chosen=winner,
        threads=torch.get_num_threads(),
        isa=kernels.isa_in_use(),
        inputs=describe(args, kwargs),
        notes=notes,
    )
    return Program(chosen.run, None if winner == EAGER else captured.out_spec, explanation)


def _tune(
    fused: fx.GraphModule, tuner: Tuner, on_progress: Progress | None
) -> dict[fx.Node, Tuned]:
    found = {node: read_layer(fused, node) for node in fused.graph.nodes if is_layer(node)}
    layers = {node: layer for node, layer in found.items() if layer is not None}
    return dict(zip(layers, tuner.tune(list(layers.values()), on_progress), strict=True))


def _accepted(
    contenders: list[Contender],
    leaves: list[Any],
    expected: Any,
    settings: Settings,
    notes: list[str],
) -> Iterator[Contender]:
    """Those whose outputs agree with the original's."""
    wanted = pytree.tree_leaves(expected)
    for each in contenders:
        flaw = flaw_of(partial(each.run, *leaves), wanted, settings.tolerance)
        if flaw is None:
            yield each
        else:
            notes.append(f"{each.name} rejected: {flaw}")


def _choose(runs: dict[str, Callable[[], Any]], settings: Settings) -> tuple[dict[str, float], str]:
    """Time what is left; a strategy that was asked for wins if it is right."""
    seconds = settings.measure(runs, _SECONDS_END_TO_END)
    if settings.strategy == "fastest":
        return seconds, fastest(seconds)
    if settings.strategy not in seconds:
        raise ValueError(
            f"strategy {settings.strategy!r} is not available for this model, "
            f"expected 'fastest' or one of {sorted(seconds)}"
        )
    return seconds, settings.strategy


def _rows(tuned: Mapping[fx.Node, Tuned], chosen: Contender, total: float) -> list[LayerRow]:
    runs_as = {node: piece for piece in chosen.pieces for node in piece.kernels}
    plans = [piece for piece in chosen.pieces if piece.planned]
    rows = []
    for node, each in tuned.items():
        piece = runs_as.get(node)
        if piece is None:
            rows.append(layer_row(each, None, TORCH_LAYER, each.seconds_dense, total))
            continue
        used = piece.kernels[node]
        name, seconds = used.name, (each.planned if piece.planned else each.direct)[used.name]
        if piece.planned:
            name = f"{name.removeprefix('planned ')} (plan {plans.index(piece)})"
        rows.append(layer_row(each, used, name, seconds, total))
    return rows


def layer_row(
    tuned: Tuned, used: Candidate | None, kernel: str, seconds: float, total: float
) -> LayerRow:
    """One line of the explanation; `used` is None for a layer that stays as it was."""
    layer = tuned.layer
    sparse, pattern = (False, None) if used is None else (used.sparse, used.pattern)
    bound = bound_of(layer, sparse, torch.get_num_threads(), pattern)
    return LayerRow(
        layer=layer.name,
        op=layer.op,
        shape=tuple(layer.weight.shape),
        sparsity=layer.zeros.sparsity,
        pattern=layer.zeros.pattern,
        kernel=kernel,
        seconds_sparse=tuned.seconds_sparse,
        seconds_dense=tuned.seconds_dense,
        share=seconds / total,
        bound=bound.name if bound else None,
        reach=bound.seconds / seconds if bound else None,
    )


def _plan_by_module(
    original: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    expected: Any,
    settings: Settings,
    reason: str,
) -> Program:
    warnings.warn(f"{reason}; compiling module by module instead", stacklevel=2)
    tuner = Tuner(settings.threads, settings.open_cache(), settings.race)
    swapped, swaps = module_calls.swap(original, args, kwargs, tuner, settings.on_progress)
    notes = [reason, "compiled module by module", *tuner.notes]
    runs: dict[str, Callable[[], Any]] = {EAGER: lambda: original(*args, **kwargs)}
    flaw = flaw_of(lambda: swapped(*args, **kwargs), expected, settings.tolerance)
    if flaw is None:
        runs[module_calls.STRATEGY] = lambda: swapped(*args, **kwargs)
    else:
        notes.append(f"{module_calls.STRATEGY} rejected: {flaw}")
    seconds, winner = _choose(runs, settings)
    used = winner != EAGER
    rows = []
    for each in swaps:
        best = each.best_direct if used else None
        name = TORCH_LAYER if best is None else best.name
        rows.append(layer_row(each, best, name, each.direct[name], seconds[winner]))
    explanation = Explanation(
        rows=rows,
        strategies=seconds,
        chosen=winner,
        threads=torch.get_num_threads(),
        isa=kernels.isa_in_use(),
        inputs=describe(args, kwargs),
        notes=notes,
    )
    return Program(swapped if used else original, None, explanation)
