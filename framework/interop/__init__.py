"""Weights of the official releases, one family a file."""
