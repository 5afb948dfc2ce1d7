"""Which plan is the best, and why."""
