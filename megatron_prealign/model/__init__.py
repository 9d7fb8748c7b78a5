"""Builds Megatron-Core's `GPTModel`: layer specification, initial weights, FLOPs. Defines no model of its own."""
