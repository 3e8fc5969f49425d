"""What a model wrote, taken apart into reasoning, text and tool calls, and the grammar that makes it write calls."""
