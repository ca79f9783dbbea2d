"""The steps a recipe is made of: each a record of settings with a ``run``."""
