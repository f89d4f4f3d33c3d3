"""What a user loads: a target, its adapters, its drafter."""
