"""Checkpoints to and from Hugging Face.

`families/` has one declarative table per model family: fields of config.json and of the recipe, built-in values, and
the Hugging Face name and form of each Megatron-Core tensor. `config.py` and `tensors.py` read the tables; nothing else
knows a family. `to_hf.py` and `from_hf.py` convert one tensor at a time in one process on a CPU and never build the
model; `verify.py` and `both_models.py` build both and compare them, ours loaded by Megatron-Core's names and not
through the tables.
"""
