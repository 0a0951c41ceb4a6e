"""Episodes to look at: recorded step by step, drawn as pictures, written as a video or shown in a window."""
