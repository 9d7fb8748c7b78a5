"""The loop, its phases, callbacks, metrics and checkpoints."""
