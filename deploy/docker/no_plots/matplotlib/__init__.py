"""Stands in for matplotlib where nothing draws: cellpylib, which reasoning-gym imports, imports it for its plots."""
