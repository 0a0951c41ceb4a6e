"""What trained agents and finished runs tell."""
