"""Plug-ins for Longshore, one of each kind."""
