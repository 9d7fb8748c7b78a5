"""Where a run starts: choosing and verifying a checkpoint, what may differ from it, and loading it.

A run resumes only as itself. Model, tokenizer, precision, sequence length, attention across documents, seed, segmenters
and dictionary must be those of the checkpoint: another value would repeat or skip data, switch other words or train
another model without saying so. The parallel layout, the length of the run and the blend may change.
"""
