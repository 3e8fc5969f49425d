"""What everything else rests on: errors, results, progress, the environment."""
