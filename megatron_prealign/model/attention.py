"""Fused causal attention for the plain-torch layer specification.

Megatron-Core's local `DotProductAttention` writes the `[batch, heads, sequence, sequence]` scores to memory;
`scaled_dot_product_attention` does not.

A mask that keeps documents apart costs what the scores would cost for one head: `document_mask` makes one per
microbatch, all layers and heads read the same memory.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule


def document_mask(document_starts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The attention mask that is causal and lets position q attend from `document_starts[q]` on only.

    It is made of numbers to add to the scores because `scaled_dot_product_attention` turns a boolean mask into such
    numbers at every call and keeps them for the backward pass (measured with torch 2.13 on a CPU: three calls keep
    three copies of a boolean mask, and of this one no copy). A microbatch holds its mask until its backward pass is
    through: `batch * sequence^2` numbers, in bf16 34 MB a row at 4,096 tokens, and as many times that as a pipeline
    stage has microbatches in flight.

    Args:
        document_starts: integers `[batch, sequence]`, each at most its own position.
        dtype: the queries' type.

    Returns:
        `dtype` `[batch, 1, sequence, sequence]`: 0 where q may attend to k, otherwise minus infinity.
    """
    batch, sequence = document_starts.shape
    key = torch.arange(sequence, device=document_starts.device)
    apart = key < document_starts[:, :, None]
    apart |= key > key[:, None]
    mask = torch.zeros((batch, 1, sequence, sequence), dtype=dtype, device=document_starts.device)
    return mask.masked_fill_(apart[:, None], -torch.inf)


def keeps_documents_apart(model: GPTModel) -> bool:
    """Whether the model's attention takes a `document_mask`: that of Transformer Engine does not look at one."""
    return all(isinstance(layer.self_attention.core_attention, FusedCausalAttention) for layer in model.decoder.layers)


class FusedCausalAttention(MegatronModule):
    """Causal self-attention by `scaled_dot_product_attention`, grouped queries included."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type is not AttnMaskType.causal:
            raise ValueError(f"attn_mask_type is {attn_mask_type}, FusedCausalAttention computes causal attention only")
        if config.context_parallel_size != 1:
            raise ValueError(f"context_parallel_size is {config.context_parallel_size}, FusedCausalAttention needs 1")
        self.softmax_scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """`query` is `[sequence, batch, heads, channels]`, `key` and `value` have the key/value heads; returns
        `[sequence, batch, heads * channels]`.

        `attention_mask` is a `document_mask`, recognised by its four dimensions, or one of two things that leave
        attention causal: None, or a tensor of two dimensions, by which the alignment phase knows a batch of words again
        (see `alignment.taps`)."""
        if packed_seq_params is not None or attention_bias is not None:
            raise ValueError("FusedCausalAttention takes neither packed sequences nor an attention bias")
        mask = attention_mask if attention_mask is not None and attention_mask.dim() == 4 else None
        if mask is not None and mask.dtype is torch.bool:
            # Megatron-Core's say where not to attend, torch's where to.
            raise ValueError("FusedCausalAttention takes no boolean mask, expected one of document_mask")
        grouped = query.shape[2] != key.shape[2]
        if grouped and (query.dtype is torch.float32 or mask is not None):
            # The fused kernels that share key/value heads take half precision only and no mask.
            key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
            grouped = False
        dropout = self.dropout if self.training else 0.0
        # Tensor-parallel ranks hold other heads and must drop other scores; under sequence parallelism all of the block
        # runs in that random state already.
        fork = dropout > 0 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if fork else nullcontext():
            context = F.scaled_dot_product_attention(
                # [sequence, batch, heads, channels] -> [batch, heads, sequence, channels]
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=self.softmax_scale,
                enable_gqa=grouped,
            )
        return context.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
