"""Reads and writes tensors of a checkpoint one at a time in one process without a process group, for conversion and
export."""
