"""The systems of the K-FAC family, one a file, on common factors and curvatures."""
