"""Stands in for matplotlib's toolkits: see matplotlib."""
