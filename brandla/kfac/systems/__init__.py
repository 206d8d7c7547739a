"""The systems of the K-FAC family, one per file, on common factors and curvatures."""
