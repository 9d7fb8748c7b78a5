"""Phase 1: word batches, layer taps and the contrastive objective."""
