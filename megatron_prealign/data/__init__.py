"""Token files and the samples of a run: `.bin/.idx`, the sidecar, word bitmaps, the blend, the sample index.

Each source is read in epochs, each epoch a shuffle of its own: sample k of a source is the same whatever the blend and
the length of the run. A blend that changes on resume starts at the position that was reached, and every source
continues where it stopped.
"""
