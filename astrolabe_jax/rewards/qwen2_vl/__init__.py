"""Rewards on Qwen2-VL: HPSv3 and VideoAlign."""
