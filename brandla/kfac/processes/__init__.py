"""Several processes exchange rows and factors, so that all of them take the same step."""
