"""Checkpoints: what they contain, how they are written and read, and where a run resumes.

A checkpoint is a directory `step_00000400` with sharded tensors, `state.json`, the recipe, the tokenizer, the
config.json for an export and, written last, a manifest with the size and checksum of every file.

`directory.py`, `manifest.py`, `state.py` and `retention.py` define a checkpoint directory and import no torch.
`store.py` saves the checkpoints of a run. `sharded/` writes and reads tensors on all ranks of a run through
Megatron-Core; `single_process/` does so in one process, without a process group. `resume/` decides where a run starts.
`commands/` implements the actions of `megatron-prealign checkpoint`.
"""
