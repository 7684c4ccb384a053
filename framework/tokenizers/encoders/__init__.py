"""Registered encoders, one idea a file."""
