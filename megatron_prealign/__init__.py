"""Multilingual pretraining on Megatron-Core: alignment initialisation and in-batch code-switching.

Importing the package imports neither torch nor Megatron-Core: `--help` and recipe validation answer at once.
"""

__version__ = "0.1.0"
