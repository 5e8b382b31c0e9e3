"""The command line: `quantlib demo | inspect | doctor | eval | quantize`, also as `python -m quantlib`."""

from quantlib.cli.app import app

__all__ = ["app"]
