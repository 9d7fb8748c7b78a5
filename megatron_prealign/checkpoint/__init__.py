"""Everything about checkpoints: what is in them, how they are written and read, where a run resumes.

A checkpoint is a directory `step_00000400` with sharded tensors, `state.json`, the recipe, the tokenizer, the
config.json of an export and, written last, a manifest with the size and checksum of every file.

`directory.py`, `manifest.py`, `state.py` and `retention.py` say what a checkpoint directory is, without torch.
`store.py` saves those of a run. `sharded/` writes and reads tensors with all processes of a run through Megatron-Core;
`single_process/` does so in one process, without a process group. `resume/` decides where a run starts. `commands/` are
the actions of `megatron-prealign checkpoint`.
"""
