"""What lies on disk: the folder of a run, and the files in it."""
