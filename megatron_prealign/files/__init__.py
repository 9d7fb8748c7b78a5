"""Writing files safely: atomic renames, syncing, checksums, locks, directories that disappear again on failure."""
