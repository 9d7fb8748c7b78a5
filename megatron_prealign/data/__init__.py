"""Token files and training samples: `.bin/.idx`, the sidecar, word bitmaps, the blend and the sample index.

Every source is read in epochs, each shuffled separately: sample k of a source does not depend on the blend or the
length of the run. A blend that changes on resume starts at the current position, and every source continues where it
stopped.
"""
