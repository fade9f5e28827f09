"""Whole programs to start from: `python -m wrn_fast.recipes.train`."""
