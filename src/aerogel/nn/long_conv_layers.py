"""Layers around long convolutions: LongConv, Hyena; and making trained ones frequency-sparse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.nn.flashfftconv import FlashFFTConv, depthwise_conv1d, mask_of

_KERNEL_SCALE = 0.002  # of the initial filters (Fu et al., arXiv 2302.06646)
_SHORT_TAPS = 3
_FILTER_FEATURES = 16  # frequencies of the positions that Hyena's filter network sees
_FILTER_FREQUENCY = 10.0  # of its sines
_DECAYS = (0.3, 1.5)  # slow and fast decay of its filters: e-foldings over a hundredth of log(100)


class LongConv(nn.Module):
    """Convolution with a free filter of the sequence's length, skip, GELU, and a gated projection.

    Args:
        d: channels.
        length: of the longest sequence.
        squash: filters are shrunk towards zero by this much, sign(k) relu(|k| - squash).
        kernel_dropout: of filter values, in training.
        dropout: of outputs, in training.
        partial: train and use only this many taps.

    Raises:
        ValueError: sizes below 1.

    Reference:
        Fu et al., Simple Hardware-Efficient Long Convolutions for Sequence Modeling, arXiv
        2302.06646; the layer that FlashFFTConv runs.
    """

    def __init__(
        self,
        d: int,
        length: int,
        *,
        squash: float = 0.001,
        kernel_dropout: float = 0.0,
        dropout: float = 0.0,
        partial: int | None = None,
    ) -> None:
        super().__init__()
        if d < 1 or length < 1:
            raise ValueError(f"d={d}, length={length}: expected at least 1")
        self.d, self.length, self.squash = d, length, squash
        self.kernel_dropout, self.dropout = kernel_dropout, dropout
        taps = length if partial is None else min(partial, length)
        self.kernel = nn.Parameter(_KERNEL_SCALE * torch.randn(d, taps))
        self.skip = nn.Parameter(torch.randn(d))
        self.conv = FlashFFTConv(transform_length(length))
        self.project = nn.Linear(d, 2 * d)

    @classmethod
    def from_published(
        cls, state_dict: Mapping[str, Tensor], *, squash: float = 0.1, dropout: float = 0.1
    ) -> LongConv:
        """The authors' layer (``LongConv`` of ``flashfftconv_long_convs.py``) from its weights.

        Its filters have twice as many taps as the sequence: the later half reaches ahead, as the
        transform is circular.

        Args:
            state_dict: ``D``, ``kernel`` and ``output_linear.0.*``; ``flashfftconv.*`` is left out.
            squash: its ``kernel_lam``.
            dropout: its own.

        Raises:
            ValueError: other weights, or more than one channel.
        """
        names = {
            "D": "skip",
            "kernel": "kernel",
            "output_linear.0.weight": "project.weight",
            "output_linear.0.bias": "project.bias",
        }
        given = {k: v for k, v in state_dict.items() if not k.startswith("flashfftconv.")}
        if set(given) != set(names):
            raise ValueError(f"state_dict: {sorted(given)}, expected {sorted(names)}")
        if given["kernel"].dim() != 3 or len(given["kernel"]) != 1 or given["kernel"].shape[2] % 2:
            raise ValueError(
                f"kernel: shape {tuple(given['kernel'].shape)}, expected (1, channels, twice the "
                "length)"
            )
        given |= {name: given[name][0] for name in ("D", "kernel")}
        d, taps = given["kernel"].shape
        made = cls(d, taps // 2, squash=squash, dropout=dropout)
        made.kernel = nn.Parameter(torch.empty_like(given["kernel"]))
        made.conv = FlashFFTConv(taps)
        made.load_state_dict({names[name]: weight for name, weight in given.items()})
        return made

    def filters(self) -> Tensor:
        """(d, taps): the filters in force."""
        k: Tensor = self.kernel
        k = k.sign() * (k.abs() - self.squash).relu()
        return F.dropout(k, self.kernel_dropout, self.training)

    def forward(self, u: Tensor) -> Tensor:
        """(batch, d, length) -> the same."""
        y = self.conv(u, self.filters()) + self.skip[:, None] * u
        y = F.dropout(F.gelu(y), self.dropout, self.training)
        return F.glu(self.project(y.transpose(1, 2)), -1).transpose(1, 2)


class HyenaFilter(nn.Module):
    """Filters as a function of the position: a small network of sines under a decaying window.

    Args:
        d: filters.
        length: taps.
        width: of the network.

    Reference:
        Poli et al., Hyena Hierarchy, arXiv 2302.10866.
    """

    def __init__(self, d: int, length: int, width: int = 64) -> None:
        super().__init__()
        t = torch.linspace(0, 1, length)[:, None]
        bands = torch.linspace(1e-4, _FILTER_FEATURES - 1, _FILTER_FEATURES)
        angle = 2 * math.pi * bands * t
        features = torch.cat((t, angle.cos(), angle.sin()), 1)
        self.positions: Tensor
        self.register_buffer("positions", features, persistent=False)
        slow, fast = (math.log(100) / decay for decay in reversed(_DECAYS))
        decay = (-t * torch.linspace(slow, fast, d)).exp()
        self.window: Tensor
        self.register_buffer("window", decay, persistent=False)
        widths = (1 + 2 * _FILTER_FEATURES, width, width)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.last = nn.Linear(width, d, bias=False)

    def forward(self) -> Tensor:
        """(d, length)."""
        x: Tensor = self.positions
        for layer in self.hidden:
            x = torch.sin(_FILTER_FREQUENCY * layer(x))
        return (self.last(x) * self.window).t()


class HyenaOperator(nn.Module):
    """Mixes tokens by long convolutions between gates, in place of attention.

    Args:
        d: channels.
        length: of the longest sequence.
        order: products with gates, at least 2; there is one long filter fewer.
        filter_mlp_width: of the networks that make the filters.

    Raises:
        ValueError: order below 2.

    Reference:
        Poli et al., Hyena Hierarchy, arXiv 2302.10866.
    """

    def __init__(self, d: int, length: int, order: int = 2, filter_mlp_width: int = 64) -> None:
        super().__init__()
        if order < 2:
            raise ValueError(f"order={order}: expected at least 2")
        self.d, self.length, self.order = d, length, order
        self.enter = nn.Linear(d, (order + 1) * d)
        self.short = nn.Parameter(torch.randn((order + 1) * d, _SHORT_TAPS) / _SHORT_TAPS)
        self.filters = nn.ModuleList(
            HyenaFilter(d, length, filter_mlp_width) for _ in range(order - 1)
        )
        self.skips = nn.Parameter(torch.randn(order - 1, d))
        self.conv = FlashFFTConv(transform_length(length))
        self.leave = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, d) -> the same."""
        parts = depthwise_conv1d(self.enter(x).transpose(1, 2), self.short)
        *gates, v = parts.split(self.d, 1)
        for i, make in enumerate(self.filters):
            pre, post = gates[-1 - i], gates[0] if i == self.order - 2 else None
            y = self.conv(v, make()[:, : x.shape[1]], pre, post)
            skipped = self.skips[i][:, None] * pre * v
            v = y + (skipped if post is None else post * skipped)
        return self.leave(v.transpose(1, 2))


def transform_length(length: int) -> int:
    """The transform that a causal convolution of this length gets: a power of two from twice on."""
    return 1 << (2 * length - 1).bit_length()


def sparsify_frequency(model: nn.Module, sparsity: float, pattern: str = "lowpass") -> int:
    """Zero this fraction of the frequencies of every long convolution in a trained model, in place.

    Args:
        model: holds `FlashFFTConv`s, e.g. in `LongConv` or `HyenaOperator`.
        sparsity: fraction of zeros, in [0, 1); 0 undoes it.
        pattern: "lowpass", or "block" (skipped in execution, too).

    Returns:
        How many convolutions were changed.

    Raises:
        ValueError: a sparsity outside [0, 1), an unknown pattern, or no convolution.

    Reference:
        Fu et al., arXiv 2311.05908, section 3.3.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity={sparsity}: expected a fraction in [0, 1)")
    found = [each for each in model.modules() if isinstance(each, FlashFFTConv)]
    if not found:
        raise ValueError("model: holds no long convolution")
    for conv in found:
        mask = mask_of(conv.seqlen, 1.0 - sparsity, pattern)
        conv.keep_frequencies(mask if sparsity > 0 else None)
    return len(found)


def shorten_filters(model: nn.Module, taps: int | None) -> int:
    """Use only the first taps of every long convolution in a model, in place; None for all.

    Returns:
        How many convolutions were changed.

    Raises:
        ValueError: fewer than one tap, or no convolution.
    """
    if taps is not None and taps < 1:
        raise ValueError(f"taps={taps}: expected at least 1")
    found = [each for each in model.modules() if isinstance(each, FlashFFTConv)]
    if not found:
        raise ValueError("model: holds no long convolution")
    for conv in found:
        conv.partial = taps
    return len(found)
