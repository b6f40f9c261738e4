"""Rewards on CLIP: HPSv2.1 and the LAION aesthetic predictor."""
