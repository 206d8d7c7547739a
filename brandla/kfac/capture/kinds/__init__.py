"""Kinds of modules, one family a file: each turns calls into rows and gradients into matrices."""
