"""Which parameters take part: a model's weights, by module type and by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from aerogel.arguments import check_names

WEIGHT_TYPES: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

_NORMALISATION: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True)
class ParamRef:
    """One selected parameter, wherever it lives: wrapped by a parametrization, or shared.

    Attributes:
        name: fully qualified name, e.g. ``"encoder.0.weight"`` (never the parametrized one).
        module: the module that owns it.
        attribute: its name in the module, e.g. ``"weight"`` or ``"weight_hh_l0"``.
        aliases: other (module, attribute) places that hold the very same parameter.
    """

    name: str
    module: nn.Module
    attribute: str
    aliases: tuple[tuple[nn.Module, str], ...] = ()

    @property
    def parameter(self) -> nn.Parameter:
        """The stored (leaf) parameter that the optimizer sees."""
        return leaf_parameter(self.module, self.attribute)

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight, ``(out, in, *kernel)`` for linear and convolution layers."""
        return self.parameter.shape

    @property
    def places(self) -> tuple[tuple[nn.Module, str], ...]:
        """Every (module, attribute) that holds the parameter, the owner first."""
        return ((self.module, self.attribute), *self.aliases)

    @property
    def flat_buffered(self) -> bool:
        """Whether a module needs the parameter itself in place (flat recurrent weights)."""
        return any(isinstance(module, nn.RNNBase) for module, _ in self.places)


def leaf_parameter(module: nn.Module, attribute: str) -> nn.Parameter:
    """The parameter behind ``module.attribute``, seen through a parametrization if there is one."""
    if parametrize.is_parametrized(module, attribute):
        lists = module.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        leaf = lists[attribute].original
    else:
        leaf = getattr(module, attribute)
    if not isinstance(leaf, nn.Parameter):
        raise ValueError(f"{type(module).__name__}.{attribute} is not a parameter")
    return leaf


class ParamSelection(Mapping[str, ParamRef]):
    """Ordered mapping from fully qualified name to `ParamRef`, each parameter once.

    Raises:
        ValueError: one parameter under two names, or nothing selected.
    """

    def __init__(self, refs: Sequence[ParamRef]) -> None:
        if not refs:
            raise ValueError("selection is empty: no parameter of the model was selected")
        self._refs = {ref.name: ref for ref in refs}
        owners: dict[int, str] = {}
        for ref in refs:
            other = owners.setdefault(id(ref.parameter), ref.name)
            if other != ref.name:
                raise ValueError(f"{ref.name!r} and {other!r} are the same (tied) parameter")

    def __getitem__(self, name: str) -> ParamRef:
        try:
            return self._refs[name]
        except KeyError:
            raise KeyError(unknown_name("parameter", name, self._refs)) from None

    def __contains__(self, name: object) -> bool:
        return name in self._refs

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)

    def __repr__(self) -> str:
        rows = ", ".join(f"{name}: {tuple(ref.shape)}" for name, ref in self._refs.items())
        return f"ParamSelection({rows})"

    @property
    def numel(self) -> int:
        """Number of weights selected."""
        return sum(ref.parameter.numel() for ref in self._refs.values())

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name to stored parameter."""
        return {name: ref.parameter for name, ref in self._refs.items()}

    def weights(self) -> dict[str, Tensor]:
        """Name to effective weight, as the forward pass sees it (detached)."""
        with torch.no_grad():
            return {n: getattr(r.module, r.attribute).detach() for n, r in self._refs.items()}


def select_parameters(
    model: nn.Module,
    types: tuple[type[nn.Module], ...] = WEIGHT_TYPES,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    skip_first: bool = False,
    skip_last: bool = False,
    biases: bool = False,
) -> ParamSelection:
    """Choose the parameters of ``model`` that may become sparse.

    By default every weight of the modules of ``types``. With ``include``, exactly the weights whose
    name matches one of its globs, whatever their module: so embeddings and recurrent weights are
    chosen by name (or by adding ``nn.Embedding``, ``nn.LSTM`` to ``types``). Normalisation is never
    chosen. First and last mean the order in which the modules are defined.

    Args:
        model: any module; parametrized and tied parameters are fine.
        types: module types whose weights are chosen when ``include`` is empty.
        include: ``fnmatch`` globs on parameter names (``"layer?.*.weight"``) or the names of their
            modules (``"classifier"``).
        exclude: globs of names to leave out.
        skip_first: leave out the first chosen weight (usually the stem).
        skip_last: leave out the last chosen weight (usually the classifier).
        biases: also choose the biases of the chosen modules.

    Returns:
        The selection, in definition order.

    Raises:
        ValueError: nothing selected, or a glob that matches no parameter.
    """
    candidates = _candidates(model)
    _check_globs("include", include, candidates)
    _check_globs("exclude", exclude, candidates)

    def chosen(ref: ParamRef) -> bool:
        wanted = matches_glob(ref.name, include) if include else isinstance(ref.module, types)
        return wanted and not matches_glob(ref.name, exclude)

    weights = [r for r in candidates.values() if r.parameter.dim() > 1 and chosen(r)]
    weights = weights[int(skip_first) : len(weights) - int(skip_last)]
    if not weights:
        kinds = ", ".join(kind.__name__ for kind in types)
        raise ValueError(
            f"no parameter selected: types=({kinds}), include={tuple(include)}, "
            f"exclude={tuple(exclude)}, skip_first={skip_first}, skip_last={skip_last}"
        )
    if not biases:
        return ParamSelection(weights)
    owners = {id(ref.module) for ref in weights}
    kept = {ref.name for ref in weights}
    for ref in candidates.values():
        of_chosen = ref.parameter.dim() == 1 and id(ref.module) in owners
        if of_chosen and not matches_glob(ref.name, exclude):
            kept.add(ref.name)
    return ParamSelection([ref for ref in candidates.values() if ref.name in kept])


def end_weights(model: nn.Module) -> set[str]:
    """Names of the first convolution's weight and, if a linear layer ends the model, of its."""
    weights = list(select_parameters(model).values())
    stem = next((ref for ref in weights if not isinstance(ref.module, nn.Linear)), None)
    head = weights[-1] if isinstance(weights[-1].module, nn.Linear) else None
    return {ref.name for ref in (stem, head) if ref is not None}


def unknown_name(kind: str, name: str, known: Sequence[str] | Mapping[str, object]) -> str:
    """Message for a name that is not known, with the nearest names that are."""
    near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.4)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return f"unknown {kind} {name!r}{hint}"


def _candidates(model: nn.Module) -> dict[str, ParamRef]:
    """Every floating-point parameter outside normalisation, tied ones under their first name."""
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, (*_NORMALISATION, parametrize.ParametrizationList)):
            continue
        for attribute in _own_parameters(module):
            leaf = leaf_parameter(module, attribute)
            if leaf.is_floating_point():
                name = f"{prefix}.{attribute}" if prefix else attribute
                places.setdefault(id(leaf), []).append((name, module, attribute))
    refs = {}
    for (name, module, attribute), *others in places.values():
        refs[name] = ParamRef(name, module, attribute, tuple((m, a) for _, m, a in others))
    return refs


def _own_parameters(module: nn.Module) -> list[str]:
    names = [name for name, value in module._parameters.items() if value is not None]
    if parametrize.is_parametrized(module):
        lists = module.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        for name, wrapped in lists.items():
            # A parametrization with several originals (weight norm) has no single tensor to mask.
            if isinstance(getattr(wrapped, "original", None), nn.Parameter):
                names.append(name)
    # Parametrizing moves a name to the end; sorting keeps the order the same before and after.
    return sorted(names, key=lambda name: ("bias" in name, name))


def matches_glob(name: str, globs: Sequence[str]) -> bool:
    """Whether a glob matches the parameter's name or the name of its module."""
    owner = name.rpartition(".")[0]
    return any(fnmatchcase(name, glob) or fnmatchcase(owner, glob) for glob in globs)


def _check_globs(argument: str, globs: Sequence[str], known: Mapping[str, ParamRef]) -> None:
    check_names(argument, globs)
    for glob in globs:
        if not any(matches_glob(name, (glob,)) for name in known):
            raise ValueError(
                f"{argument}: no parameter matches; {unknown_name('glob', glob, known)}"
            )
