"""The compiled model: called like the original, thread-safe, for inference only."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from aerogel.runtime.calls import CallPattern, leaf_key
from aerogel.runtime.explain import Explanation
from aerogel.runtime.native import PlanModule

# Input shapes whose programs are kept; each holds its own packed weights.
MAX_PROGRAMS = 8


@dataclass(frozen=True, eq=False)
class Program:
    """A model specialised to one set of input shapes.

    Attributes:
        run: Flat input leaves -> flat outputs, or with `out_spec` None a callable with the
            original's own arguments.
        out_spec: Tree of the outputs.
        explanation: What was chosen and why.
    """

    run: Callable[..., Any]
    out_spec: pytree.TreeSpec | None
    explanation: Explanation

    @cached_property
    def only_output(self) -> bool:
        """Whether there is a single output, not in a tuple or dict."""
        return self.out_spec is not None and self.out_spec.is_leaf()

    @cached_property
    def run_plain(self) -> Callable[[Any], Tensor | None] | None:
        """One plain tensor -> the output, or None where `run` has to look; None: always."""
        plan = getattr(self.run, "__self__", None)
        return plan.run_plain if isinstance(plan, PlanModule) and self.only_output else None


class CompiledModule(nn.Module):
    """What `aerogel.compile` returns.

    Called with the original's arguments, it returns the original's outputs, structure included,
    detached from autograd. Other input sizes are planned on their first call (seconds) and kept for
    later ones; beyond `MAX_PROGRAMS` the least recently used is dropped. Calls from several threads
    are safe. Where several cores are used, a few calls now and then run on one, or the other way
    round, and what is faster is kept: a core that another process has taken is not waited for.
    Everything is computed in the model's own dtypes: autocast has no effect. `state_dict` is that
    of the original with its masks baked in; new weights need a new `aerogel.compile`. Copies share
    the plans. Attributes that a compiled model does not have (`config`, ...) are looked up on the
    original.
    """

    def __init__(
        self,
        original: nn.Module,
        pattern: CallPattern,
        plan: Callable[[tuple[Any, ...], dict[str, Any]], Program],
    ) -> None:
        super().__init__()
        self.original = original
        self._pattern = pattern
        self._plan = plan
        self._programs: OrderedDict[Any, Program] = OrderedDict()
        self._latest: tuple[Any, Program] | None = None  # last in _programs
        self._first: Explanation | None = None
        self._lock = threading.Lock()  # guards these three, held for a look-up only
        self._planning = threading.Lock()  # one plan at a time: they are measured
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's forward, without gradients.

        Raises:
            RuntimeError: An input requires a gradient while gradients are recorded.
            ValueError: An input has another rank, is not on the CPU, or has sizes that the original
                refuses.
            TypeError: An input has another dtype or layout.
        """
        # After other work a call finds the caches cold: the usual one takes few steps.
        latest = self._latest
        if latest is not None and len(args) == self._pattern.positional_tensors == 1 and not kwargs:
            run = latest[1].run_plain
            y = None if run is None else run(args[0])
            if y is not None:
                return y
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self.forward(*args, **kwargs)
        key, args, kwargs, leaves = self._read(args, kwargs)
        if torch.is_grad_enabled():
            self._refuse_gradients(leaves)
            with torch.no_grad():
                return self._run(key, args, kwargs, leaves)
        return self._run(key, args, kwargs, leaves)

    def _run(
        self,
        key: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: tuple[Any, ...] | list[Any],
    ) -> Any:
        program = self._lookup(key)
        if program is None:
            program = self._replan(key, args, kwargs, leaves)
        try:
            if program.out_spec is None:
                return program.run(*args, **kwargs)
            outputs = program.run(*leaves)
        except Exception:
            self._pattern.check_places(leaves)  # the key does not tell: every call would pay
            raise
        if program.only_output:
            return outputs[0]
        return pytree.tree_unflatten(outputs, program.out_spec)

    def explain(self) -> Explanation:
        """Zeros, kernel and time of every layer, for the shapes of the example."""
        assert self._first is not None
        return self._first

    def prepare(self, *args: Any, **kwargs: Any) -> Explanation:
        """Plan for the shapes of these inputs now, so that the first real call is quick."""
        key, args, kwargs, leaves = self._read(args, kwargs)
        program = self._lookup(key) or self._replan(key, args, kwargs, leaves)
        return program.explanation

    def _read(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any], tuple[Any, ...] | list[Any]]:
        """What the program depends on, and the inputs in the example's form and flat."""
        as_example = not kwargs and len(args) == self._pattern.positional_tensors
        if as_example and all([type(each) is Tensor for each in args]):  # noqa: C419
            return tuple([(each.shape, each.dtype) for each in args]), args, kwargs, args
        args, kwargs = self._pattern.canonical(args, kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if len(leaves) == self._pattern.positional_tensors and spec == self._pattern.spec:
            return tuple(leaf_key(each) for each in leaves), args, kwargs, leaves
        return (spec, *(leaf_key(each) for each in leaves)), args, kwargs, leaves

    def _lookup(self, key: Any) -> Program | None:
        latest = self._latest
        if latest is not None and latest[0] == key:
            return latest[1]
        with self._lock:
            program = self._programs.get(key)
            if program is not None:
                self._programs.move_to_end(key)
                self._latest = key, program
            return program

    def _replan(
        self,
        key: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: tuple[Any, ...] | list[Any],
    ) -> Program:
        self._pattern.check(leaves, pytree.tree_structure((args, kwargs)))
        with self._planning:
            program = self._lookup(key)  # another thread may have planned it meanwhile
            if program is None:
                program = self._plan(args, kwargs)
                self._remember(key, program)
            return program

    def _remember(self, key: Any, program: Program) -> None:
        with self._lock:
            self._first = self._first or program.explanation
            self._programs[key] = program
            self._latest = key, program
            while len(self._programs) > MAX_PROGRAMS:
                self._programs.popitem(last=False)

    def _refuse_gradients(self, leaves: tuple[Any, ...] | list[Any]) -> None:
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                raise RuntimeError(
                    f"{self._pattern.name_of(index)!r} requires a gradient, but a compiled model "
                    "is for inference: call it under torch.no_grad(), detach the input, or train "
                    "the original model"
                )

    def train(self, mode: bool = True) -> CompiledModule:
        """Only evaluation: the compiled weights cannot be trained.

        Raises:
            RuntimeError: `mode` is True.
        """
        if mode:
            raise RuntimeError("a compiled model is for inference: train the original model")
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's weights under the original's names, masks baked in."""
        return self.original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the kernels hold packed weights.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("load weights into the original model, then call aerogel.compile again")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompiledModule:
        probe = fn(torch.zeros(1, dtype=torch.float32, device="cpu"))
        if probe.device.type != "cpu" or probe.dtype != torch.float32:
            raise RuntimeError(
                f"a compiled model stays on the CPU in its dtypes, cannot move to {probe.device}, "
                f"{probe.dtype}: convert the original model, then call aerogel.compile again"
            )
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModule:
        twin = CompiledModule(self.original, self._pattern, self._plan)
        memo[id(self)] = twin
        with self._lock:
            twin._programs = OrderedDict(self._programs)
            twin._first = self._first
        return twin

    def __copy__(self) -> CompiledModule:
        return self.__deepcopy__({})

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a compiled model cannot be pickled: save the original with aerogel.save and compile "
            "it after loading (measurements come from the cache)"
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "original":
                raise
            return getattr(self.original, name)

    def extra_repr(self) -> str:
        """How it runs, in one line."""
        return "" if self._first is None else f"{self._first.chosen}, {self._first.inputs}"
