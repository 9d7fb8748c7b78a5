"""The actions of `megatron-prealign dataset`: each works on finished token files."""
