"""A declarative table for each family of models."""
