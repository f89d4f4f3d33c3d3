"""Recipes that make models, each in a package of its own."""
