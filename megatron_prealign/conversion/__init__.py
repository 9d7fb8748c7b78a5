"""Converts checkpoints to and from Hugging Face.

`families/` has one declarative table per model family: the fields of config.json and of the recipe, supported values,
and the Hugging Face name and layout of each Megatron-Core tensor. `config.py` and `tensors.py` read the tables; all
other modules are independent of the family. `to_hf.py` and `from_hf.py` convert one tensor at a time in one process on
a CPU and never build the model. `verify.py` and `hidden_states.py` build both models and compare them; the
Megatron-Core model is loaded by Megatron-Core's names, not through the tables.
"""
