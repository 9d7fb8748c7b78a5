"""One module a file format: each turns a file into blocks of word pairs."""
