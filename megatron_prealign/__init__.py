"""Multilingual pretraining on Megatron-Core: alignment initialisation and in-batch code-switching.

Importing the package imports neither torch nor Megatron-Core, which keeps `--help` and recipe validation fast.
"""

__version__ = "0.1.0"
