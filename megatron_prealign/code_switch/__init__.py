"""Code-switching during language-model training: the dictionary applied to a batch on the device."""

from megatron_prealign.code_switch.schedule import RatioSchedule
from megatron_prealign.code_switch.switcher import CodeSwitcher, RowFormat, SwitchedBatch, plain_batch

__all__ = ["CodeSwitcher", "RatioSchedule", "RowFormat", "SwitchedBatch", "plain_batch"]
