"""What the fine-tune does to the base: every changed tensor, and how."""
