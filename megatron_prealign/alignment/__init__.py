"""The alignment phase: word batches, layer taps, projection heads, frozen blocks."""
