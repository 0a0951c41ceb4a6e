"""N environments in worker processes behind one interface."""
