"""Start of a run: chooses and verifies a checkpoint, checks what may differ from it, and loads it.

Model, tokenizer, precision, sequence length, attention across documents, seed, segmenters and dictionary must be those
of the checkpoint: another value would silently repeat or skip data, switch other words or train another model. The
parallel layout, the length of the run and the blend may change.
"""
