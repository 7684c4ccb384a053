"""Convolutional autoencoders: published latent spaces, and codes of images."""
