"""The numbers of DESIGN section 8, measured: ``python -m bench.run``."""
