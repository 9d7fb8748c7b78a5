"""Code-switching during language-model training: the dictionary table applied to a batch on its device.

Every decision is integer arithmetic on Philox 4x32-10 keyed by (seed, sample id, position), so the result does not
depend on batch, rank, device, layout or resumption.
"""

from megatron_prealign.code_switch.schedule import RatioSchedule
from megatron_prealign.code_switch.switcher import CodeSwitcher, SequenceFormat, SwitchedBatch, plain_batch

__all__ = ["CodeSwitcher", "RatioSchedule", "SequenceFormat", "SwitchedBatch", "plain_batch"]
