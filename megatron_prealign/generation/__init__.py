"""Text generation with transformers, from a checkpoint or a Hugging Face model directory."""
