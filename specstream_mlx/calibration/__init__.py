"""What a pass costs on this machine and how often streams are right, and the draft plan that follows."""
