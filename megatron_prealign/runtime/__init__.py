"""Where a run happens: device, process groups, seeds, logging, and every touch of Megatron-Core's globals."""
