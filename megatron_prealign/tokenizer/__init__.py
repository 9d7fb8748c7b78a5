"""Hugging Face, sentencepiece and clone tokenizers behind one interface; word boundaries; segmenters.

The fingerprint of a tokenizer is a hash of everything that affects ids. Every dataset, dictionary table and checkpoint
stores it, and a mismatch is an error before training starts.
"""
