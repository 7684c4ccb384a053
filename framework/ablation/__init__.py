"""Ablations: a grid of overrides over one configuration, trained over seeds, and the table that comes of it."""
