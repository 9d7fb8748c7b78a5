"""Converts text to token files and trains tokenizers.

`run.py` combines the parts: `corpus` splits inputs into blocks, `worker_pool.py` sends them to processes that run
`tokenise.py`, and `journal.py` records how much output is safely on disk. The parent process makes all output decisions
in block order, so the output bytes depend neither on the number of workers nor on interruptions.
"""
