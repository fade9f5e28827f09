"""`python -m wrn_fast.demo`: the reference and the drop-in side by side on real images, then their speed."""
