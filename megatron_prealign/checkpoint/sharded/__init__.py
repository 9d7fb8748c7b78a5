"""The sharded state of a running job, through Megatron-Core's `dist_checkpointing`.

A save has one collective half, in which all ranks plan and copy their shards into host memory, and one half in threads
of each process, which talk to no other rank: receipts in the directory tell rank 0 when all files are written.
Megatron-Core's own helper processes are not used: the job hangs when one of them dies.
"""
