"""Device kernels, each beside a plain-torch reference that gives the same integers."""

from megatron_prealign.kernels.code_switch_reference import (
    LABEL_MODES,
    CodeSwitchOutput,
    code_switch_reference,
    ratio_threshold,
)
from megatron_prealign.kernels.ngram_table import MAX_NGRAM, NgramTable, build_ngram_table, lookup
from megatron_prealign.kernels.philox import philox_4x32_10

__all__ = [
    "LABEL_MODES",
    "MAX_NGRAM",
    "CodeSwitchOutput",
    "NgramTable",
    "build_ngram_table",
    "code_switch_reference",
    "lookup",
    "philox_4x32_10",
    "ratio_threshold",
]
