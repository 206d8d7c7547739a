"""Typical networks trained with every K-FAC system of the library, and optimizers and models on its functions."""
