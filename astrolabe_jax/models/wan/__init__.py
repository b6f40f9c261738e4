"""The causal Wan video generator: sizes and frame layout, the DiT, its cache. The VAE is a
neighbour in vae.py.
"""
