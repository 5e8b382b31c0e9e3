"""Measurements and generated tables. Nothing here is imported by the package.

Importing it lets quantlib run from this source tree where it is not installed (bench/source_tree.py).
"""

from bench import source_tree

source_tree.register()
