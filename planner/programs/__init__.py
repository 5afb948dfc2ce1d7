"""From a plan to a proved program, and who waits for whom in it."""
