"""Estimate what a run would cost before it starts: work, speed, memory."""
