"""Checkpoints to Hugging Face and back: one declarative table for each family of models."""
