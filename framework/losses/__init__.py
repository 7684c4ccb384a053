"""Losses on images, shared by every task."""
