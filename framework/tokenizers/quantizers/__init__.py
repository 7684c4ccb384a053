"""Registered quantizers, one idea a file."""
