"""Answers over HTTP: requests of several clients go through one batch, in one thread that owns the model."""
