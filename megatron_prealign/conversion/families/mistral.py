"""Mistral: Llama's tensors, with a sliding window."""

from megatron_prealign.conversion.families import llama
from megatron_prealign.conversion.family import Family

FAMILY = Family(
    name="mistral",
    title="Mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    base_prefix="model.",
    fields={**llama.FIELDS, "sliding_window": "sliding_window"},
    required=llama.REQUIRED,
    # A missing sliding_window is transformers' default, null means no window.
    defaults={
        **llama.DEFAULTS,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    fixed={"hidden_act": "silu"},
    rope=True,
    first=llama.FIRST,
    layer=llama.LAYER,
    last=llama.LAST,
    output=llama.OUTPUT,
    layer_prefix=llama.LAYER_PREFIX,
    buffer_suffixes=llama.BUFFER_SUFFIXES,
)
