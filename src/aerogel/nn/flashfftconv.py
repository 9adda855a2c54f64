"""FlashFFTConv: convolutions as long as the sequence, and their partial and frequency-sparse forms.

Paper: Fu, Kumbong, Nguyen, Ré, "FlashFFTConv: Efficient Convolutions for Long Sequences with Tensor
Cores", ICLR 2024, arXiv 2311.05908.

Idea: a depthwise convolution with a filter as long as the sequence mixes tokens in N log N. The
paper writes the Fourier transform as small matrix products, fuses gates and filter into it, and
then skips blocks of it: filters shorter than the sequence (partial convolutions), and filters whose
spectrum is zero in blocks (frequency-sparse ones) are to convolutions what sparse attention is to
attention.

When: models like Hyena, H3 or M2-BERT, from about a thousand steps on. On CPUs the matrix form
loses to plain transforms, so the layer runs on a native right-angle convolution instead, several
times faster than torch.fft, with gates and both kinds of skipping; the matrix form
(`algorithm="monarch"`) stays for devices with matrix units and as a reference.

Claim measured here: the claim of this system in `aerogel systems`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.kernels import FrequencyMask, fft_conv_reference, fft_conv_trainable
from aerogel.kernels.fft_conv import check_conv
from aerogel.kernels.monarch import monarch_conv
from aerogel.kernels.overlap_save import overlap_save

ALGORITHMS = ("auto", "fft", "monarch", "hybrid", "overlap_save")
BLOCK_FACTOR = 16  # outer blocks of a "block" pattern that only says how much is kept


def fft_conv(
    u: Tensor,
    k: Tensor,
    *,
    n: int | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    causal: bool = True,
    algorithm: str = "auto",
    partial: int | None = None,
    freq_keep: float | FrequencyMask | None = None,
) -> Tensor:
    """`post_gate * conv(pre_gate * u, k)`, every channel with a filter of its own; differentiable.

    Args:
        u: (batch, channels, length).
        k: (channels, taps), real.
        n: length of the transform; default 2 * length, or length if not causal.
        pre_gate: of u's shape, or None.
        post_gate: of u's shape, or None.
        causal: False for the circular convolution of length n.
        algorithm: "auto" (native on the CPU, torch.fft elsewhere), "fft" (torch.fft), "monarch"
            (matrix products), "hybrid" (the outer step by a matrix product, left-out blocks are
            skipped) or "overlap_save" (blocks a few times as long as the filter).
        partial: use only this many taps of the filter.
        freq_keep: the fraction of the lowest frequencies of the filter to keep, or a mask.

    Returns:
        (batch, channels, length), u's dtype.

    Raises:
        ValueError: shapes, dtypes or settings do not fit.

    Reference:
        Fu et al., arXiv 2311.05908.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={algorithm!r}: expected one of {', '.join(ALGORITHMS)}")
    if partial is not None:
        if partial < 1:
            raise ValueError(f"partial={partial}: expected at least one tap")
        k = k[:, :partial]
    mask = FrequencyMask(lowpass=freq_keep) if isinstance(freq_keep, float | int) else freq_keep
    if algorithm in ("auto", "fft"):
        run = fft_conv_trainable if algorithm == "auto" else fft_conv_reference
        return run(u, k, pre_gate, post_gate, n=n, causal=causal, mask=mask)
    spec = check_conv(u, k, pre_gate, post_gate, n, causal, mask)
    x = u if pre_gate is None else pre_gate * u
    if algorithm == "overlap_save":
        if mask is not None or not causal:
            raise ValueError("algorithm='overlap_save': expected causal=True and freq_keep=None")
        y = overlap_save(x, k)
    else:
        y = monarch_conv(x, k, spec.n, mask, hybrid=algorithm == "hybrid")
    return y if post_gate is None else post_gate * y


def depthwise_conv1d(x: Tensor, weight: Tensor, *, layout: str = "BHL") -> Tensor:
    """A short causal depthwise convolution, computed directly.

    Args:
        x: (batch, channels, length) for layout "BHL", (batch, length, channels) for "BLH".
        weight: (channels, taps); tap j meets the value j steps before.
        layout: "BHL" or "BLH".

    Returns:
        Of x's shape and layout.

    Raises:
        ValueError: an unknown layout, or weights of other channels.
    """
    if layout not in ("BHL", "BLH"):
        raise ValueError(f"layout={layout!r}: expected 'BHL' or 'BLH'")
    x = x if layout == "BHL" else x.transpose(1, 2)
    if weight.dim() != 2 or weight.shape[0] != x.shape[1]:
        raise ValueError(f"weight: shape {tuple(weight.shape)}, expected ({x.shape[1]}, taps)")
    padded = F.pad(x, (weight.shape[1] - 1, 0))
    y = F.conv1d(padded, weight.flip(1).unsqueeze(1), groups=x.shape[1])
    return y if layout == "BHL" else y.transpose(1, 2)


class FlashFFTConv(nn.Module):
    """A long convolution without parameters: filters and gates come with every call.

    Args:
        seqlen: length n of the transform. Sequences and filters that fit into it together are
            convolved causally, longer ones circularly.
        dtype: in which filters are given; kept for compatibility, float32 is always computed in.
        partial: use only this many taps of every filter.
        freq_keep: the fraction of the lowest frequencies to keep, or a mask.
        algorithm: as in `fft_conv`.

    Raises:
        ValueError: a length below 1, or a mask that does not fit it.

    Reference:
        Fu et al., arXiv 2311.05908; the call is that of its code.
    """

    def __init__(
        self,
        seqlen: int,
        dtype: torch.dtype = torch.float32,
        *,
        partial: int | None = None,
        freq_keep: float | FrequencyMask | None = None,
        algorithm: str = "auto",
    ) -> None:
        super().__init__()
        if seqlen < 1:
            raise ValueError(f"seqlen={seqlen}: expected at least 1")
        self.seqlen, self.dtype, self.algorithm = seqlen, dtype, algorithm
        self.partial = partial
        self.freq_keep: FrequencyMask | None = None
        self.keep_frequencies(freq_keep)

    def keep_frequencies(self, freq_keep: float | FrequencyMask | None) -> None:
        """Keep a fraction of the lowest frequencies, those of a mask, or (None) all.

        Raises:
            ValueError: the mask does not fit the transform.
        """
        mask = FrequencyMask(lowpass=freq_keep) if isinstance(freq_keep, float | int) else freq_keep
        if mask is not None:
            mask.check(self.seqlen)
        self.freq_keep = mask

    def forward(
        self,
        u: Tensor,
        k: Tensor,
        pregate: Tensor | None = None,
        postgate: Tensor | None = None,
    ) -> Tensor:
        """u, gates: (batch, channels, length); k: (channels, taps) -> (batch, channels, length)."""
        taps = k.shape[-1] if self.partial is None else min(self.partial, k.shape[-1])
        return fft_conv(
            u,
            k,
            n=self.seqlen,
            pre_gate=pregate,
            post_gate=postgate,
            causal=u.shape[-1] + taps - 1 <= self.seqlen,
            algorithm=self.algorithm,
            partial=self.partial,
            freq_keep=self.freq_keep,
        )

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.seqlen}, partial={self.partial}, freq_keep={self.freq_keep}"


class PartialConv(FlashFFTConv):
    """Filters cut to their first `keep` taps.

    Args:
        seqlen: as in `FlashFFTConv`.
        keep: taps.
    """

    def __init__(self, seqlen: int, keep: int) -> None:
        super().__init__(seqlen, partial=keep)


class FrequencySparseConv(FlashFFTConv):
    """Filters whose spectrum is zero in part.

    Args:
        seqlen: as in `FlashFFTConv`.
        keep: fraction of the frequencies that is kept; or None, with `factors` and `zeros`.
        factors: (N1, ..., Np), product `seqlen`, of the pattern "block".
        zeros: how many of the last values of each m_i are zero.
        pattern: "lowpass" keeps the lowest frequencies; "block" keeps the first values of every
            m_i in m = m1 + N1 * (m2 + ...), and those that are left out of m1 cost nothing.

    Raises:
        ValueError: an unknown pattern, or settings that do not fit it.
    """

    def __init__(
        self,
        seqlen: int,
        keep: float | None = None,
        *,
        factors: tuple[int, ...] = (),
        zeros: tuple[int, ...] = (),
        pattern: str = "lowpass",
    ) -> None:
        if keep is None and not factors:
            raise ValueError("keep=None: expected a fraction, or factors and zeros")
        mask = FrequencyMask(tuple(factors), tuple(zeros))
        super().__init__(seqlen, freq_keep=mask if keep is None else mask_of(seqlen, keep, pattern))


def mask_of(n: int, keep: float, pattern: str) -> FrequencyMask:
    """The mask of a pattern that keeps about this fraction of n frequencies.

    Raises:
        ValueError: an unknown pattern, a fraction outside (0, 1], or n without such blocks.
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep={keep}: expected a fraction in (0, 1]")
    if pattern == "lowpass":
        return FrequencyMask(lowpass=keep)
    if pattern != "block":
        raise ValueError(f"pattern={pattern!r}: expected 'lowpass' or 'block'")
    if n % BLOCK_FACTOR:
        raise ValueError(f"seqlen={n}: expected a multiple of {BLOCK_FACTOR} for pattern='block'")
    zeros = BLOCK_FACTOR - max(1, round(keep * BLOCK_FACTOR))
    return FrequencyMask((BLOCK_FACTOR, n // BLOCK_FACTOR), (zeros, 0))
