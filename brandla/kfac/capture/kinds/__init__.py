"""Kinds of modules: how calls become rows and gradients a matrix, one family of modules a file."""
