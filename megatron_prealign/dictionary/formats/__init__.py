"""One module per file format; each converts a file into blocks of word pairs."""
