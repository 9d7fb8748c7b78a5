"""Benchmarks of kernels, phases, preprocessing and conversion: `megatron-prealign benchmark`."""
