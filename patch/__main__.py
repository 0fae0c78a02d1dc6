"""`python -m patch`, the same as the console script `patch-llm`."""

from patch.cli import main

main()
