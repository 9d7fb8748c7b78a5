"""Safe file output: atomic writes, fsync, checksums, locks and cleanup of directories after a failure."""
