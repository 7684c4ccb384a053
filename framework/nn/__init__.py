"""Layers that every model shares: attention, transformer blocks, positions."""
