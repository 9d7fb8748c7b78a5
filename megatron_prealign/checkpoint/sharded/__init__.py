"""Sharded state of a running job, through Megatron-Core's `dist_checkpointing`.

A save has a collective part, in which all ranks plan and copy their shards into host memory, and a background part in
threads of each process, without communication: receipts in the directory show rank 0 when all files are written.
Megatron-Core's own helper processes are not used: the job hangs when one of them dies.
"""
