"""What finished and unfinished runs say: read from their folders, grouped, compared and drawn."""
