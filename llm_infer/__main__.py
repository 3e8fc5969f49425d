"""`python -m llm_infer` is `llm-infer`."""

from llm_infer.commands.app import main

if __name__ == "__main__":
    main()
