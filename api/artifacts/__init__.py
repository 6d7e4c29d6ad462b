"""Artifacts: what a succeeded job published, and the store that finished files live in."""
