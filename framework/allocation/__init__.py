"""How many tokens each image keeps: rules, searches and learned policies."""
