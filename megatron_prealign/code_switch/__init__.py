"""Code-switching during language-model training: the dictionary table applied to a batch on its device.

Every decision is integer arithmetic on Philox 4x32-10 keyed by (seed, sample id, position), so the result does not
depend on batch, rank, device, layout or resumption.
"""
