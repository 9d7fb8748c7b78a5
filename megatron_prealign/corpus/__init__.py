"""Text files as users have them: inputs, compression, Parquet, the Hub, and documents in bounded memory.

Where an input is cut into blocks depends on the input alone. A block of an uncompressed `.jsonl` file is a span of
bytes that a worker reads by itself; blocks of other inputs are read in the parent process.
"""
