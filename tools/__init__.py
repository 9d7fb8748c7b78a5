"""One module per sub-command: parses options, calls the library, prints results."""
