"""From requests to device steps and back."""
