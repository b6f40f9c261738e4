"""Rewards of motion, on the optical flow that SEA-RAFT sees."""
