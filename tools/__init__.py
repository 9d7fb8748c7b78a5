"""One module per command of the command line: parse, call the library, print."""
