"""Triton kernels. Imported only when they run: Triton itself is optional."""
