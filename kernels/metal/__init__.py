"""Metal sources, the functions that launch them, and the check that runs on the user's GPU."""
