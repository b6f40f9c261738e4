"""Reinforcement learning of few-step autoregressive video models on the forward process, in JAX."""

__version__ = "0.2.0"
