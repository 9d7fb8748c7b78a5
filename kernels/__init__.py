"""Device kernels, each with a plain-torch reference: integer results are equal, floating-point sums within rounding."""

from megatron_prealign.kernels.build_ngram_table import build_ngram_table
from megatron_prealign.kernels.code_switch import code_switch
from megatron_prealign.kernels.code_switch_interface import (
    LABEL_MODES,
    LANGUAGES_FROM,
    CodeSwitchBatch,
    CodeSwitchOutput,
    CodeSwitchSettings,
    ratio_threshold,
)
from megatron_prealign.kernels.code_switch_reference import code_switch_reference, document_starts_of
from megatron_prealign.kernels.contrastive import contrastive_loss
from megatron_prealign.kernels.contrastive_interface import WordGroups, word_groups
from megatron_prealign.kernels.contrastive_reference import contrastive_loss_reference
from megatron_prealign.kernels.ngram_table import MAX_NGRAM, NgramTable
from megatron_prealign.kernels.philox import philox_4x32_10

__all__ = [
    "LABEL_MODES",
    "LANGUAGES_FROM",
    "MAX_NGRAM",
    "CodeSwitchBatch",
    "CodeSwitchOutput",
    "CodeSwitchSettings",
    "NgramTable",
    "WordGroups",
    "build_ngram_table",
    "code_switch",
    "code_switch_reference",
    "contrastive_loss",
    "contrastive_loss_reference",
    "document_starts_of",
    "philox_4x32_10",
    "ratio_threshold",
    "word_groups",
]
