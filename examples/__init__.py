"""Networks that people train, with every K-FAC system of the library."""
