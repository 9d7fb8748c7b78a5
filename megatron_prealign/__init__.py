"""Multilingual pretraining on Megatron-Core: alignment phase and input-only code-switching.

Importing the package imports neither torch nor Megatron-Core, which keeps `--help` and recipe validation fast.
"""

__version__ = "0.1.0"
