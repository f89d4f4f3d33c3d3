"""Sequences to tokens."""
