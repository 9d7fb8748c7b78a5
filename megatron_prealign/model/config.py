"""Builds Megatron-Core's `TransformerConfig` and layer specification from the recipe."""

import copy
import importlib.util

import torch
import torch.nn.functional as F
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_prealign.errors import UserError
from megatron_prealign.model.attention import FusedCausalAttention
from megatron_prealign.model.norm import LayerNorm, RMSNorm
from megatron_prealign.recipe import Recipe
from megatron_prealign.runtime.distributed import Runtime


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU with the tanh approximation, as in GPT-2."""
    return F.gelu(x, approximate="tanh")


def _skip_init(tensor: torch.Tensor) -> None:
    """Does nothing: `model.initialise` sets every weight afterwards, independently of the layout."""


def transformer_config(recipe: Recipe, runtime: Runtime) -> TransformerConfig:
    """Megatron-Core's configuration for this recipe and device."""
    model, parallel = recipe.model, recipe.parallel
    rotary = model.is_rotary
    on_gpu = runtime.device.type == "cuda"
    dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
    # Megatron-Core compiles fused element-wise operations at first use, which needs Triton and pays off only on a GPU.
    fuse = on_gpu and importlib.util.find_spec("triton") is not None
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        ffn_hidden_size=model.mlp_width,
        kv_channels=model.head_dim,
        normalization="RMSNorm" if rotary else "LayerNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        gated_linear_unit=rotary,
        activation_func=F.silu if rotary else gelu_tanh,
        add_bias_linear=not rotary,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method=_skip_init,
        output_layer_init_method=_skip_init,
        embedding_init_method=_skip_init,
        use_cpu_initialization=not on_gpu,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=model.recompute_granularity,
        recompute_method="uniform" if model.recompute_granularity == "full" else None,
        recompute_num_layers=model.recompute_num_layers if model.recompute_granularity == "full" else None,
        bias_activation_fusion=fuse and rotary,
        bias_dropout_fusion=fuse,
        cross_entropy_loss_fusion=fuse,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        # NCCL keeps a tensor's memory until it is sent. gloo reads it while sending, and the interleaved schedule does
        # not wait for that (observed: losses off by 6e-4 in one step of five).
        deallocate_pipeline_outputs=on_gpu or not interleaved,
        # With two stages, the next stage is also the previous one: the interleaved schedule's batched sends and
        # receives would be mismatched (observed as a hang in 0.16.1). One direction at a time avoids this.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        finalize_model_grads_func=finalize_model_grads,
    )


def block_spec(
    recipe: Recipe, config: TransformerConfig, runtime: Runtime, vp_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    """The layers of one model chunk.

    With Transformer Engine and `data.reset_attention_mask`, the core attention is replaced by `FusedCausalAttention`:
    Megatron-Core passes Transformer Engine the mask type causal, with which it ignores the mask itself (according to
    its documentation). This combination is untested: Transformer Engine was not available.

    Raises:
        UserError: Transformer Engine is requested but not installed.
    """
    if recipe.model.transformer_impl == "transformer_engine":
        try:
            import transformer_engine  # noqa: F401
        except ImportError as error:
            raise UserError(
                "model.transformer_impl is transformer_engine, but Transformer Engine is not installed; "
                "install it or set model.transformer_impl to local"
            ) from error
        engine_layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=recipe.model.qk_layernorm)
        if recipe.data.reset_attention_mask:
            engine_layer = copy.deepcopy(engine_layer)
            engine_layer.submodules.self_attention.submodules.core_attention = FusedCausalAttention
        return engine_layer
    norm = RMSNorm if recipe.model.is_rotary else LayerNorm
    layer = copy.deepcopy(get_gpt_layer_local_spec(normalization=config.normalization))
    layer.submodules.input_layernorm = norm
    layer.submodules.pre_mlp_layernorm = norm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = FusedCausalAttention
    if recipe.model.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=runtime.pipeline_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)
