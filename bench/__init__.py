"""Measurements and generated tables. Nothing here is imported by the package."""
