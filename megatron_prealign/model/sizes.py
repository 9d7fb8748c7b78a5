"""Number of parameters of a model and of each of its processes, from the recipe. Imports no torch."""

from megatron_prealign.recipe import ModelSection, ParallelSection


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel_size: int) -> int:
    """The smallest multiple of `divisible_by * tensor_parallel_size` that is at least `vocab_size`."""
    multiple = divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


def count_model_parameters(model: ModelSection, *, padded_vocab_size: int, seq_length: int) -> int:
    """Number of parameters of the complete model, each counted once; rows that pad the vocabulary included."""
    embedding = padded_vocab_size * model.hidden_size
    output = 0 if model.share_embeddings_and_output_weights else embedding
    return embedding + _positions(model, seq_length) + model.num_layers * _block(model, 1) + _final_norm(model) + output


def count_stage_parameters(
    model: ModelSection, parallel: ParallelSection, *, padded_vocab_size: int, seq_length: int
) -> list[int]:
    """Number of parameters of one process of each pipeline stage, first stage first.

    The tensor-parallel processes of a stage have equally many: each has a part of the matrices and all of the norms.
    """
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    embedding = padded_vocab_size * model.hidden_size // tensor
    counts = [model.num_layers // stages * _block(model, tensor)] * stages
    counts[0] += embedding + _positions(model, seq_length)
    counts[-1] += _final_norm(model)
    # With several stages, the last one has a copy of a tied embedding.
    if stages > 1 or not model.share_embeddings_and_output_weights:
        counts[-1] += embedding
    return counts


def _block(model: ModelSection, tensor: int) -> int:
    """Parameters of a transformer block in one of `tensor` processes."""
    hidden, width = model.hidden_size, model.mlp_width
    queries = model.num_attention_heads * model.head_dim
    qkv = queries + 2 * model.query_groups * model.head_dim
    matrices = hidden * (qkv + queries) + hidden * width * (3 if model.is_rotary else 2)
    biased_qkv = not model.is_rotary or model.add_qkv_bias
    partitioned = matrices + (qkv if biased_qkv else 0) + (0 if model.is_rotary else width)
    # Norms, and the biases that are added to the sum over the processes.
    replicated = 2 * hidden if model.is_rotary else 6 * hidden
    if model.qk_layernorm:
        replicated += 2 * model.head_dim
    return partitioned // tensor + replicated


def _final_norm(model: ModelSection) -> int:
    return model.hidden_size if model.is_rotary else 2 * model.hidden_size


def _positions(model: ModelSection, seq_length: int) -> int:
    return 0 if model.is_rotary else (model.max_position_embeddings or seq_length) * model.hidden_size
