"""`python -m llm_infer.bench gpu --out DIR`: benchmarks that run where only JAX, Flax, einops and NumPy are installed."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark that is named; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m llm_infer.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    gpu = commands.add_parser("gpu", help="check and measure the GPU kernels and the engine on this machine")
    gpu.add_argument("--out", required=True, help="folder for gpu.json and gpu.md")
    gpu.add_argument(
        "--minutes", type=float, default=8.5, help="sections that would begin after this time are left out"
    )
    gpu.add_argument(
        "--small", action="store_true", help="tiny sizes; the kernels are interpreted where there is no GPU"
    )
    gpu.add_argument("--only", default="", help="comma-separated names of sections")
    parsed = parser.parse_args(arguments)
    from llm_infer.bench.gpu.run import run

    return run(parsed.out, minutes=parsed.minutes, small=parsed.small, only=parsed.only)


if __name__ == "__main__":
    sys.exit(main())
