"""Text to token files, and tokenizer training.

`run.py` puts the parts together: `corpus` cuts inputs into blocks, `worker_pool.py` sends them to processes that run
`tokenise.py`, and `journal.py` records how much output is safe on disk. The parent process takes all decisions about
output in the order of the blocks, so neither the number of workers nor an interruption shows in the bytes.
"""
