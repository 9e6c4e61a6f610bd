"""The numbers of README.md, measured: ``python -m bench.run``."""
