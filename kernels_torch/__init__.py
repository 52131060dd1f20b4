"""Variants in plain PyTorch: the baselines that run everywhere."""
