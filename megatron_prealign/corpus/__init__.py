"""Reads documents from text files, compressed files, Parquet and the Hugging Face Hub in bounded memory.

Block boundaries depend only on the input. A block of an uncompressed `.jsonl` file is a byte span that the worker
reads; blocks of other inputs are read in the parent process.
"""
