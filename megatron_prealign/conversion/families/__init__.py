"""One declarative table per model family."""

from megatron_prealign.conversion.families import gpt2, llama, mistral, qwen2, qwen3
from megatron_prealign.conversion.family import Family

FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in (llama, mistral, qwen2, qwen3, gpt2)}
"""`model.family` of a recipe -> its table."""
