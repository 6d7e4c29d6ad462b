"""Bitmill."""
