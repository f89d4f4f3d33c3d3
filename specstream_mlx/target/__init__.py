"""A model that runs rows, and knows no drafter."""
