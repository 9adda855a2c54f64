"""How a packed weight may be executed, and which ways are worth timing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from aerogel.kernels._library import native
from aerogel.kernels.formats import BlockRowWeight
from aerogel.kernels.window import ConvGeometry

LAYOUTS = ("channels", "tokens")


class SpmmVariant(NamedTuple):
    """How a weight is executed. Every variant gives the same bits; only the time differs.

    Attributes:
        vectors: widest register tile of columns, in vectors of the instruction set.
        groups: block rows walked together: 1, 2, 4, or (single rows whose activations are packed)
            the instruction set's `lockstep`, 6 or 8.
        k_blocks: slabs into which the input features are cut, to keep them in the first cache.
        row_tiles: tiles into which the outputs are cut, for reuse and for several threads.
        pack: copy slabs to aligned scratch first (always so for tokens).
        column_tiles: register tiles in a panel. They share each read of the weights, and their
            activations come from the second cache; 1 keeps those in the first.
    """

    vectors: int
    groups: int = 1
    k_blocks: int = 1
    row_tiles: int = 1
    pack: bool = False
    column_tiles: int = 1


class StoredSize(NamedTuple):
    """What of a packed weight decides which variants are worth timing.

    Attributes:
        shape: (out, in).
        block: outputs that share a stored column.
        columns: stored, of all block rows.
        values: stored.
    """

    shape: tuple[int, int]
    block: int
    columns: int
    values: int

    @property
    def density(self) -> float:
        """Share of values that are stored."""
        return self.values / max(math.prod(self.shape), 1)


def default_variant(weight: BlockRowWeight, columns: int, layout: str = "channels") -> SpmmVariant:
    """A good variant without timing: the first of `spmm_variants`, remembered."""
    key = (columns, layout, native().isa())
    variant = weight._defaults.get(key)
    if variant is None:
        variant = weight._defaults[key] = spmm_variants(weight, columns, layout)[0]
    return variant


# Register tiles worth trying by lanes and block, as (groups, vectors), the likeliest first: a cover
# of exhaustive searches over MobileNetV1's layers and BERT's at 70 to 90 % zeros (Zen 3 and 4,
# MobileNetV1's at 90 % also Sapphire Rapids).
_LOCKSTEP = 0  # stands for the instruction set's own number of groups
_WIDE_TILES = {
    1: ((2, 12), (2, 8), (1, 10)),
    2: ((1, 10), (2, 12), (1, 12)),
    4: ((1, 6), (1, 4)),
}
_TILES: dict[int, dict[int, tuple[tuple[int, int], ...]]] = {
    16: {
        1: ((_LOCKSTEP, 3), (4, 4), (2, 4), (1, 5), (1, 7)),
        2: ((2, 2), (2, 3), (4, 3)),
        4: ((1, 4), (1, 6), (1, 3)),
    },
    8: {
        1: ((2, 5), (_LOCKSTEP, 2), (1, 7), (2, 6)),
        2: ((2, 3), (1, 5), (1, 4)),
        4: ((1, 3), (1, 2)),
    },
    4: _WIDE_TILES,
}
_SLAB_BYTES = 32 << 10  # what a slab of activations may take: about a first-level cache
# What a panel that is read in place may take, by block. Where every multiply-add loads, only the
# first cache is fast enough; where blocks share their loads, most of the second will do. Few inputs
# then make wide panels, whose rows of outputs are written in longer pieces: up to twice as fast.
_PANEL_BYTES = {1: 48 << 10, 2: 384 << 10, 4: 384 << 10}
# By lanes: a shorter row per slab costs more in beginnings and ends than the cache returns. Wide
# vectors need more bytes a cycle than the second cache gives.
_SLAB_STEPS = {16: 12, 8: 25, 4: 25}
# Density from which most rows of activations serve several rows of a lockstep group: no slabs.
_DENSE_LOCKSTEP = 0.15
_REUSE_TO_PACK = 8  # uses of an activation that pay for copying it
_TASKS = 8  # panels x tiles that keep a few threads busy
_TILE_ROWS = 64
_SHARED_PIXELS = 256  # planes of fewer are shared by outputs: as many for each thread


def spmm_variants(
    weight: BlockRowWeight | StoredSize,
    columns: int,
    layout: str = "channels",
    threads: int | None = None,
) -> list[SpmmVariant]:
    """The variants worth timing for a weight and a number of columns, the likeliest first.

    Args:
        weight: packed weight, or the size of one.
        columns: pixels of one image, or tokens.
        layout: "channels" (packing and direct variants) or "tokens" (packing ones only).
        threads: that will share the work. One needs no tiles of outputs, each of which has ends of
            its own; None: a few.

    Returns:
        4 to 20 different variants.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: expected one of {', '.join(LAYOUTS)}")
    if isinstance(weight, BlockRowWeight):
        size = StoredSize(weight.shape, weight.block, len(weight.columns), weight.values.numel())
    else:
        size = weight
    rows = max(size.shape[0], 1)
    pack_first = size.values / max(size.shape[1], 1) >= _REUSE_TO_PACK
    packs = (pack_first, not pack_first) if layout == "channels" else (True,)
    tasks = 1 if threads == 1 else _TASKS
    shares = threads or 2
    found: dict[SpmmVariant, None] = {}
    for pack in packs:
        for vectors, groups in _register_tiles(size.block, columns, pack):
            side = 1 if pack else _column_tiles(size, vectors, columns)
            panels = -(-columns // (side * vectors * native().lanes()))
            tiles = -(-tasks // max(panels, 1))
            if layout == "channels" and columns < _SHARED_PIXELS:
                tiles = -(-tiles // shares) * shares
            tiles = min(tiles, max(rows // _TILE_ROWS, 1))
            for k_blocks in _slab_counts(size, vectors, groups):
                found[SpmmVariant(vectors, groups, k_blocks, tiles, pack, side)] = None
    return list(found)


def _register_tiles(block: int, columns: int, pack: bool) -> list[tuple[int, int]]:
    """(vectors, groups) worth trying; panels of equal widths, none wider than needed."""
    module = native()
    needed = max(1, -(-columns // module.lanes()))
    found: dict[tuple[int, int], None] = {}
    tiles = _TILES[module.lanes()][block]
    if needed <= module.spmm_max_vectors(4, block):  # few columns: more rows, independent sums
        lockstep = tuple(tile for tile in tiles if tile[0] == _LOCKSTEP)
        tiles = (*lockstep, (4, needed), *tiles)
    for groups, wanted in tiles:
        if groups == _LOCKSTEP and not pack:
            continue
        rows = groups or module.spmm_lockstep()
        limit = min(wanted, module.spmm_max_vectors(rows, block))
        found[-(-needed // -(-needed // limit)), rows] = None
    return list(found)


def _column_tiles(size: StoredSize, vectors: int, columns: int) -> int:
    """Register tiles in a panel that is read in place."""
    tile = vectors * native().lanes()
    fitting = _PANEL_BYTES[size.block] // max(4 * size.shape[1] * tile, 1)
    return max(1, min(fitting, -(-columns // tile)))


def _slab_counts(size: StoredSize, vectors: int, groups: int) -> list[int]:
    """Numbers of slabs worth trying: by the rule above, and half of that."""
    if size.block > 1:  # more multiply-adds than loads: the cache is not the limit
        return [1]
    if groups > 4 and size.density >= _DENSE_LOCKSTEP:
        return [1]
    steps = size.columns / max(size.shape[0], 1)
    least = _SLAB_STEPS[native().lanes()]
    slab_bytes = size.shape[1] * vectors * native().lanes() * 4
    wanted = 1
    while steps / (2 * wanted) >= least and slab_bytes / wanted > _SLAB_BYTES:
        wanted *= 2
    return sorted({wanted, max(wanted // 2, 1)}, reverse=True)


# Register tiles worth trying for convolutions by lanes and block, as (groups, vectors, register
# tiles in a panel), the likeliest first: a cover of exhaustive searches over ResNet-50's 3x3 layers
# at 90 % zeros (Zen 4 with either width, Sapphire Rapids). Higher panels copy less input at their
# borders.
_CONV_TILES: dict[int, dict[int, tuple[tuple[int, int, int], ...]]] = {
    16: {
        1: ((_LOCKSTEP, 3, 6), (1, 10, 3), (1, 8, 1), (2, 8, 1), (2, 4, 2), (4, 4, 2)),
        2: ((2, 2, 8), (4, 2, 8)),
        4: ((1, 4, 8), (1, 5, 4)),
    },
    8: {
        1: ((1, 7, 3), (2, 6, 3), (1, 10, 1), (2, 5, 2)),
        2: ((2, 2, 8), (1, 5, 6)),
        4: ((1, 3, 8), (1, 3, 6)),
    },
    4: {
        1: ((1, 12, 3), (2, 12, 1)),
        2: ((1, 12, 3), (2, 6, 3)),
        4: ((1, 6, 4), (1, 6, 8)),
    },
}
# What a slab of strips may take: about a first-level cache, or more where rows in lockstep share
# loads.
_CONV_SLAB_BYTES = {1: 40 << 10, 2: 48 << 10, 4: 56 << 10}
_LOCKSTEP_SLAB_BYTES = 128 << 10


def sparse_conv_variants(
    weight: BlockRowWeight,
    geometry: ConvGeometry,
    size: Sequence[int],
    threads: int | None = None,
    images: int = 1,
) -> list[SpmmVariant]:
    """The variants worth timing for a packed convolution, the likeliest first.

    Args:
        weight: packed (out, in / groups * kh * kw).
        geometry: of the convolution.
        size: height and width of an input image.
        threads: that will share the work; default `torch.get_num_threads()`.
        images: whose planes lie side by side in a plan, see `images_together`.

    Returns:
        1 to 18 different variants; all of them pack.
    """
    module = native()
    channels = weight.shape[1] // math.prod(geometry.kernel)
    rows = max(weight.shape[0] // geometry.groups, 1)
    threads = torch.get_num_threads() if threads is None else threads
    found: dict[SpmmVariant, None] = {}
    for wanted_groups, wanted, side in _CONV_TILES[module.lanes()][weight.block]:
        tile_groups = wanted_groups or module.spmm_lockstep()
        vectors = min(wanted, module.spmm_max_vectors(tile_groups, weight.block))
        whole = SpmmVariant(vectors, tile_groups, 1, 1, True, side)
        panels, floats = module.sparse_conv_panels(
            *size, geometry.numbers, module.SpmmVariant(*whole), images
        )
        # No more than needed: every range of rows copies its panel's input again.
        row_tiles = min(-(-threads // (panels * geometry.groups)), max(rows // _TILE_ROWS, 1))
        lockstep = wanted_groups == _LOCKSTEP
        budget = _LOCKSTEP_SLAB_BYTES if lockstep else _CONV_SLAB_BYTES[weight.block]
        slabs = max(1, round(4 * channels * floats / budget))
        for k_blocks in (slabs, 2 * slabs, max(slabs // 2, 1)):
            found[whole._replace(k_blocks=k_blocks, row_tiles=row_tiles)] = None
    return list(found)


def images_together(columns: int, batch: int, threads: int | None = None) -> int:
    """Images whose planes lie side by side in a plan, at most: several, if planes are small.

    Args:
        columns: of one image's plane.
        batch: images of a run.
        threads: of a run; default `torch.get_num_threads()`.
    """
    threads = torch.get_num_threads() if threads is None else threads
    return int(native().plan_group_images(columns, batch, threads))
