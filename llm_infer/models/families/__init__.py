"""One thin file per model family."""
