"""What a checkpoint folder is: its names, its manifest, and its tensors read and written by one process."""
