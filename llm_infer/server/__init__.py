"""The HTTP server: OpenAI's interface over a `Session`. Needs the extra `server`."""
