"""Numbers and pictures of trained models, each number with the protocol under which it was measured."""
