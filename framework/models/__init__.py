"""Trained models: loaded from runs, exported as folders of their own, and found in the Hugging Face hub's cache."""
