"""Registered decoders, one idea a file."""
