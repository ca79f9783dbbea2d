"""Lets the tests in the folders below import ``cases``: pytest puts this file's folder on the path."""
