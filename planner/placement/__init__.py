"""Where a model is cut and where its stages go: the strategies, and what saves memory."""
