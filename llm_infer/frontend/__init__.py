"""Text requests over an engine: what `LLM` and other fronts share."""
