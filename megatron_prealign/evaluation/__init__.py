"""Validation loss, word retrieval, the alignment watch and the training report."""
