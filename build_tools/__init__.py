"""How setup.py builds the compiled extensions: the standard library only, since it runs before anything else is installed."""


class BuildError(Exception):
    """Why an extension, or a part of one, was not built, in words for the user."""
