"""The actions of `megatron-prealign checkpoint`."""
