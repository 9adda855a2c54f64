"""The blocks a network consists of, found and run one at a time on recorded inputs (P12)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

ForwardFn = Callable[[nn.Module, Any], Any]


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Call `model` on one batch of the usual shapes, moved to the model's device.

    Args:
        model: any module.
        batch: a tensor (the only input), a mapping (keyword arguments), or a tuple/list whose
            first element is the input and whose rest are labels.

    Raises:
        TypeError: any other type of batch.
    """
    place = next((p.device for p in model.parameters()), None)
    if isinstance(batch, Mapping):
        return model(**{key: to_device(value, place) for key, value in batch.items()})
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise TypeError(
            f"a batch must be a tensor, (input, labels...), or a mapping of keyword arguments; "
            f"got {type(batch).__name__} (pass forward= to run it yourself)"
        )
    return model(to_device(batch, place))


def to_device(value: Any, device: torch.device | None) -> Any:
    """`value` with every tensor in tuples, lists and mappings moved to `device`."""
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(to_device(v, device) for v in value)
    if type(value) is dict:
        return {k: to_device(v, device) for k, v in value.items()}
    return value


def find_blocks(model: nn.Module, name: str | None = None) -> tuple[str, list[nn.Module]]:
    """The list of blocks a model consists of.

    Args:
        model: any module, for example a transformers encoder or decoder.
        name: the list's own name; None takes the longest outermost `nn.ModuleList` of equal
            blocks, and an `nn.Sequential` of equal blocks if there is no such list.

    Returns:
        (name of the list, its blocks in order).

    Raises:
        ValueError: unknown name (lists the candidates), or no list of blocks.
    """
    lists = {
        path: list(module.children())
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 0
    }
    if name is not None:
        if name not in lists:
            near = get_close_matches(name, lists, n=3, cutoff=0.2) or list(lists)[:5]
            raise ValueError(f"blocks={name!r} is no ModuleList or Sequential; nearest: {near}")
        return name, lists[name]
    for kind in (nn.ModuleList, nn.Sequential):
        paths = [
            path
            for path, children in lists.items()
            if isinstance(model.get_submodule(path), kind)
            and len({type(child) for child in children}) == 1
            and (len(children) > 1 or kind is nn.ModuleList)
            and any(True for child in children for _ in child.parameters())
        ]
        # A list inside another one (experts, branches) is part of a block, not a list of blocks.
        outer = [p for p in paths if not any(p.startswith(f"{q}.") for q in paths if q != p)]
        if outer:
            best = max(outer, key=lambda p: len(lists[p]))  # first of the longest
            return best, lists[best]
    raise ValueError(
        f"{type(model).__name__} has no list of equal blocks; name one with blocks=, or walk it "
        "with sequential=False"
    )


@dataclass
class BlockCall:
    """Arguments of one block call without its hidden states (`key`: None = first positional)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: str | None

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.key is None:
            return (hidden, *self.args), self.kwargs
        return self.args, {**self.kwargs, self.key: hidden}


# Caches are stateful: a block replayed with one would attend to its own earlier run.
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "use_cache")


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    kwargs = {k: v for k, v in kwargs.items() if k not in _CACHES}
    if args and isinstance(args[0], Tensor):
        return args[0], BlockCall(args[1:], kwargs, None)
    tensors = [k for k, v in kwargs.items() if isinstance(v, Tensor)]
    if not tensors:
        raise ValueError("a block was called without any tensor; name the blocks with blocks=")
    key = "hidden_states" if "hidden_states" in tensors else tensors[0]
    hidden = kwargs.pop(key)
    return hidden, BlockCall(args, kwargs, key)


def record_block_calls(
    model: nn.Module, chain: list[nn.Module], batch: Any, forward: ForwardFn
) -> tuple[Tensor, list[BlockCall]]:
    """One dense forward: the first block's hidden states and every block's other arguments."""
    calls: list[BlockCall] = []
    first: list[Tensor] = []
    last: list[Tensor | None] = [None]

    def on_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, call = _split_call(args, kwargs)
        position = len(calls)
        if position >= len(chain) or module is not chain[position]:
            raise ValueError("the blocks do not run once each, in order; use sequential=False")
        previous = last[0]
        if previous is None:
            first.append(hidden)
        elif hidden is not previous and not _same(hidden, previous):
            raise ValueError(
                f"block {position} does not take the output of block {position - 1}; the blocks "
                "are not a chain, use sequential=False or name another list with blocks="
            )
        calls.append(call)

    def on_return(module: nn.Module, args: Any, output: Any) -> None:
        last[0] = first_tensor(output)

    handles = [block.register_forward_pre_hook(on_call, with_kwargs=True) for block in chain]
    handles += [block.register_forward_hook(on_return) for block in chain]
    try:
        with torch.no_grad():
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) != len(chain):
        raise ValueError(f"only {len(calls)} of {len(chain)} blocks ran; use sequential=False")
    return first[0], calls


def same_arguments(calls: list[BlockCall]) -> bool:
    """Whether all blocks got the very same arguments besides the hidden states."""
    first = calls[0]
    return all(
        call.key == first.key
        and len(call.args) == len(first.args)
        and call.kwargs.keys() == first.kwargs.keys()
        and all(map(_alike, call.args, first.args))
        and all(_alike(value, first.kwargs[name]) for name, value in call.kwargs.items())
        for call in calls
    )


def _alike(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, (bool, int, float, str)) and a == b)


def record_first_call(
    model: nn.Module, chain: list[nn.Module], batch: Any, forward: ForwardFn
) -> tuple[Tensor, list[BlockCall]]:
    """As `record_block_calls` where all blocks share their arguments: nothing but block 0 is met.

    That saves a forward pass of the whole model for each batch.
    """
    seen: list[tuple[Tensor, BlockCall]] = []

    def on_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_split_call(args, kwargs))

    handle = chain[0].register_forward_pre_hook(on_call, with_kwargs=True)
    try:
        with torch.no_grad(), stopping_at(chain[0]):
            forward(model, batch)
    finally:
        handle.remove()
    if not seen:
        raise ValueError("the first block did not run; use sequential=False")
    hidden, call = seen[0]
    return hidden, [call] * len(chain)


def first_tensor(output: Any) -> Tensor | None:
    """The output itself, or the first tensor in a tuple, list, mapping or ModelOutput."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return next((v for v in output if isinstance(v, Tensor)), None)
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


class _Stop(Exception):
    """Ends a forward pass once everything of interest has run."""


@contextmanager
def stopping_at(module: nn.Module | None) -> Iterator[None]:
    if module is None:
        yield
        return

    def stop(*_: Any) -> None:
        raise _Stop

    handle = module.register_forward_pre_hook(stop)
    try:
        yield
    except _Stop:
        pass
    finally:
        handle.remove()


def configs(model: nn.Module) -> list[Any]:
    """Every distinct `config` (of transformers models) in a model, also inside wrappers."""
    found = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in found if config is not None}.values())


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no key/value cache, no fused encoder path that would bypass the hooks."""
    modes = [(module, module.training) for module in model.modules()]
    caching = [c for c in configs(model) if getattr(c, "use_cache", None)]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    for config in caching:
        config.use_cache = False
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for config in caching:
            config.use_cache = True
        for module, mode in modes:
            module.training = mode
