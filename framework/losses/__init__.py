"""Losses, shared by every task."""
