"""Model files: finding or fetching them (sources), reading them (gguf, safetensors), filling parameters (loader)."""
