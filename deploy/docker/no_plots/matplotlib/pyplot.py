"""Nothing draws here: see the package."""
