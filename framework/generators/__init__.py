"""Models that make token sequences of a class, each of its own length."""
