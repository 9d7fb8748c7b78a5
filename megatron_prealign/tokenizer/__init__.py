"""Text to token ids and back: Hugging Face, sentencepiece and clone tokenizers behind one interface; word boundaries.

The fingerprint of a tokenizer is a hash of everything that decides ids. Every dataset, dictionary table and checkpoint
stores it, and a mismatch is an error before training starts.
"""
