"""Images: where they come from, how they are cut, in which order they arrive."""
