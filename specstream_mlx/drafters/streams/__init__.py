"""Streams: guesses from a few learned rows beside the target's own."""
