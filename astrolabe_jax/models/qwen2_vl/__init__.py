"""Qwen2-VL and the reward heads on it (spec/rewards.md 5)."""
