"""python -m quantlib"""

from quantlib.cli import app

if __name__ == "__main__":
    app(prog_name="quantlib")
