"""Nothing draws here: see the package."""

Axes3D = None
