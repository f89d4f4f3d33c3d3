"""The output against a reference made another way."""
