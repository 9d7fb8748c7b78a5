"""Fused causal attention for the plain-torch layer specification.

Megatron-Core's local `DotProductAttention` writes the `[batch, heads, sequence, sequence]` scores to memory;
`scaled_dot_product_attention` does not.

A document mask takes as much memory as the scores of one head: `document_mask` builds one per microbatch, shared by all
layers and heads.
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
    """Builds the causal attention mask in which position q attends to positions from `document_starts[q]` on.

    The mask is additive because `scaled_dot_product_attention` converts a boolean mask to an additive one at every call
    and keeps it for the backward pass (measured with torch 2.13 on a CPU: three calls keep three copies of a boolean
    mask, and none of this one). A microbatch keeps its mask until its backward pass ends: `batch * sequence^2`
    elements, in bf16 34 MB per sequence of 4,096 tokens, times the microbatches in flight in a pipeline stage.

    Args:
        document_starts: Integers `[batch, sequence]`, each at most its own position.
        dtype: Dtype of the queries.

    Returns:
        `dtype` `[batch, 1, sequence, sequence]`: 0 where q may attend to k, otherwise minus infinity.
    """
    batch, sequence = document_starts.shape
    key = torch.arange(sequence, device=document_starts.device)
    masked = key < document_starts[:, :, None]
    masked |= key > key[:, None]
    mask = torch.zeros((batch, 1, sequence, sequence), dtype=dtype, device=document_starts.device)
    return mask.masked_fill_(masked[:, None], -torch.inf)


def supports_document_mask(model: GPTModel) -> bool:
    """Whether the model's attention applies a `document_mask`; Transformer Engine's ignores it."""
    return all(isinstance(layer.self_attention.core_attention, FusedCausalAttention) for layer in model.decoder.layers)


class FusedCausalAttention(MegatronModule):
    """Causal self-attention with `scaled_dot_product_attention`, including grouped-query attention."""

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
            raise ValueError(f"FusedCausalAttention: attn_mask_type is {attn_mask_type}, expected causal")
        if config.context_parallel_size != 1:
            raise ValueError(
                f"FusedCausalAttention: context_parallel_size is {config.context_parallel_size}, expected 1"
            )
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
        """`query` is `[sequence, batch, heads, head_dim]`, `key` and `value` have the key/value heads; returns
        `[sequence, batch, heads * head_dim]`.

        `attention_mask` is a `document_mask`, recognised by its four dimensions. Attention is causal if it is None or a
        tensor of two dimensions, with which the alignment phase marks a batch of words (see `alignment.taps`)."""
        if packed_seq_params is not None or attention_bias is not None:
            raise ValueError("FusedCausalAttention supports neither packed sequences nor an attention bias")
        mask = attention_mask if attention_mask is not None and attention_mask.dim() == 4 else None
        if mask is not None and mask.dtype is torch.bool:
            # True means "do not attend" in Megatron-Core and "attend" in torch.
            raise ValueError("FusedCausalAttention: got a boolean mask, expected a document_mask")
        grouped = query.shape[2] != key.shape[2]
        if grouped and (query.dtype is torch.float32 or mask is not None):
            # The fused kernels with grouped queries support only half precision and no mask.
            key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
            grouped = False
        dropout = self.dropout if self.training else 0.0
        # Tensor-parallel ranks have different heads and must drop different scores; with sequence parallelism the whole
        # block already runs in that random state.
        fork = dropout > 0 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if fork else nullcontext():
            context = F.scaled_dot_product_attention(
                # [sequence, batch, heads, head_dim] -> [batch, heads, sequence, head_dim]
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
