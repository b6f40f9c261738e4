"""Reward models: a registry of them, and a folder for each family of nets."""
