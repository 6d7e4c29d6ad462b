"""How much text runs at once: for the arithmetic of a run and, without torch, for its estimates."""

BATCH_TOKENS = 4096
"""Tokens that run through the model together while calibrating."""
