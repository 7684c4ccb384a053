"""Tokenizers: their parts and the assembly."""
