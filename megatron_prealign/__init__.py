"""Multilingual pretraining on Megatron-Core: alignment phase and input-only code-switching.

Importing the package imports neither torch nor Megatron-Core, which keeps `--help` and recipe validation fast.
"""

import os

__version__ = "0.1.0"
STARTED = os.getpid(), os.getppid()
"""Process that imported the package, and its parent at that time, before the seconds that it takes to import torch."""
