"""Sizes of the parts in which matrices are worked on, for mathematics and, without torch, estimates."""

CHUNK_TOKENS = 4096
"""Tokens in one matrix product of a Gram. Fixed, so that its bits do not depend on how they were batched."""
COMPARED_ROWS = 512
"""Rows of a weight whose error is measured at once."""
