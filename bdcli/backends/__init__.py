"""What runs the forwards of decoding: torch, compiled CPU steps, or Triton kernels in CUDA graphs."""
