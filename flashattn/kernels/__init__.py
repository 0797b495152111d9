"""The Triton kernels, and the pieces they share."""
