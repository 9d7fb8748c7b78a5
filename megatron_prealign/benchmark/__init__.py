"""Measures kernels: `megatron-prealign benchmark`."""
