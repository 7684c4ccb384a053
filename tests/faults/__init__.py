"""Faults on purpose: kills, full disks and damaged files, and what a run makes of them."""
