"""Frozen networks that perceptual distances are taken in."""
