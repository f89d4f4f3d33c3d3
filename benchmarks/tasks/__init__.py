"""Tasks to measure on: data, prompts, metrics, and how their models are made."""
