"""Floor 0: one function per native kernel, and beside it its reference in pure torch.

`AEROGEL_KERNELS=reference` runs everything on the references; `AEROGEL_ISA` picks an instruction
set.
"""

from aerogel.kernels._library import (
    available_isas,
    isa,
    isa_in_use,
    native_available,
    native_in_use,
    reference_mode,
    set_isa,
)
from aerogel.kernels.attention import attention_backward, attention_forward
from aerogel.kernels.attention_lower import TileStream, lower_ranges, lower_spans
from aerogel.kernels.attention_reference import (
    attention_backward_reference,
    attention_forward_reference,
)
from aerogel.kernels.attention_select import (
    choose_by_labels,
    label_attention,
    label_scores,
    largest_keys,
    pack_codes,
    pool_rows,
    selects_natively,
)
from aerogel.kernels.attention_select_reference import (
    KeyRule,
    choose_by_labels_reference,
    label_scores_reference,
    largest_keys_reference,
    pack_codes_reference,
    pool_rows_reference,
)
from aerogel.kernels.fft_conv import PreparedFilter, fft_conv, fft_conv_reference
from aerogel.kernels.fft_conv_ops import fft_conv_trainable
from aerogel.kernels.fft_conv_plan import FrequencyMask
from aerogel.kernels.formats import BlockRowWeight
from aerogel.kernels.gather_rows import (
    entries_above,
    entries_above_reference,
    gather_rows,
    gather_rows_reference,
)
from aerogel.kernels.gemv import gemv, gemv_reference, native_gemv_weight
from aerogel.kernels.largest import kth_largest, largest_mask, largest_mask_reference
from aerogel.kernels.nm import native_nm_weight, nm_pattern
from aerogel.kernels.nm_mask import nm_mask, nm_mask_reference
from aerogel.kernels.nm_tensor import NM24Tensor, NM24Weight, NMForm
from aerogel.kernels.ops import sddmm_op, spmm_op
from aerogel.kernels.plan import OpInfo, Plan, Value, Way
from aerogel.kernels.plan_builder import PlanBuilder
from aerogel.kernels.roofline import Roofline, roofline
from aerogel.kernels.sddmm import sddmm, sddmm_reference
from aerogel.kernels.sparse_conv import sparse_conv2d, sparse_conv2d_reference
from aerogel.kernels.sparse_input import sparse_input_linear, sparse_input_linear_reference
from aerogel.kernels.spmm import (
    ACTIVATIONS,
    native_weight,
    reference_activation,
    spmm,
    spmm_reference,
)
from aerogel.kernels.token_layers import HeadRows
from aerogel.kernels.trained import TrainedPattern
from aerogel.kernels.values import largest_level, quantize_rows
from aerogel.kernels.variants import (
    SpmmVariant,
    default_variant,
    images_together,
    sparse_conv_variants,
    spmm_variants,
)
from aerogel.kernels.vector_ops import gemv_op, sparse_input_linear_op
from aerogel.kernels.window import ConvGeometry
from aerogel.kernels.zero_pruned import pack_mask, zero_pruned_, zero_pruned_reference_

__all__ = [
    "ACTIVATIONS",
    "BlockRowWeight",
    "ConvGeometry",
    "FrequencyMask",
    "HeadRows",
    "KeyRule",
    "NM24Tensor",
    "NM24Weight",
    "NMForm",
    "OpInfo",
    "Plan",
    "PlanBuilder",
    "PreparedFilter",
    "Roofline",
    "SpmmVariant",
    "TileStream",
    "TrainedPattern",
    "Value",
    "Way",
    "attention_backward",
    "attention_backward_reference",
    "attention_forward",
    "attention_forward_reference",
    "available_isas",
    "choose_by_labels",
    "choose_by_labels_reference",
    "default_variant",
    "entries_above",
    "entries_above_reference",
    "fft_conv",
    "fft_conv_reference",
    "fft_conv_trainable",
    "gather_rows",
    "gather_rows_reference",
    "gemv",
    "gemv_op",
    "gemv_reference",
    "images_together",
    "isa",
    "isa_in_use",
    "kth_largest",
    "label_attention",
    "label_scores",
    "label_scores_reference",
    "largest_keys",
    "largest_keys_reference",
    "largest_level",
    "largest_mask",
    "largest_mask_reference",
    "lower_ranges",
    "lower_spans",
    "native_available",
    "native_gemv_weight",
    "native_in_use",
    "native_nm_weight",
    "native_weight",
    "nm_mask",
    "nm_mask_reference",
    "nm_pattern",
    "pack_codes",
    "pack_codes_reference",
    "pack_mask",
    "pool_rows",
    "pool_rows_reference",
    "quantize_rows",
    "reference_activation",
    "reference_mode",
    "roofline",
    "sddmm",
    "sddmm_op",
    "sddmm_reference",
    "selects_natively",
    "set_isa",
    "sparse_conv2d",
    "sparse_conv2d_reference",
    "sparse_conv_variants",
    "sparse_input_linear",
    "sparse_input_linear_op",
    "sparse_input_linear_reference",
    "spmm",
    "spmm_op",
    "spmm_reference",
    "spmm_variants",
    "zero_pruned_",
    "zero_pruned_reference_",
]
