"""Pictures from noise: samplers of diffusion models, and pictures of prompts with them."""
