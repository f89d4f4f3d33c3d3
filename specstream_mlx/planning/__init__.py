"""Which tree next; pure, no model."""
