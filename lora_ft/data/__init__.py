"""Rows become Examples, Examples become tokens and labels; nothing else in the package makes a mask."""
