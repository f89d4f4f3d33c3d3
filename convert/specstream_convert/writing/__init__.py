"""The output: every tensor to be written, quantisation, a directory that appears whole or not at all."""
