"""A small text-to-SQL task and the recipe that trains the bundled model on it."""
