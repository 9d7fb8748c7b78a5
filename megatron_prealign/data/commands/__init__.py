"""Implementations of the `megatron-prealign dataset` actions, which operate on preprocessed datasets."""
