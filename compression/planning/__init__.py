"""Recipe and headers into a plan: what becomes of every tensor, and what speaks against it. No torch."""
