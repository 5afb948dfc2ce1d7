"""Programs played with costs: step times, memory, and what bounds them."""
