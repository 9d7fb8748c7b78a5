"""Phase 1: word batches, layer taps, and what is trained or left beside the model."""
