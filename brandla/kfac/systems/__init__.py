"""The systems of the K-FAC family, one a file, and what they are built from."""
