"""Adapters that let other projects' programs run on an `LLM`; each module needs its library, and nothing here needs them."""
