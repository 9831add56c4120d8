"""Tiger: text-guided diffusion that makes rare classes in medical imaging learnable."""
