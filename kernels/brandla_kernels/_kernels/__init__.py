"""The Triton kernels and their launchers; imported at the first launch, so that the library imports without Triton."""
