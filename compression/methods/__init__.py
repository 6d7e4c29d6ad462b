"""Compression methods: pure tensor functions, one file each."""
