"""Tensors of a checkpoint, one at a time, in one process without a process group: for conversion and export."""
