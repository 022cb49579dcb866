"""Latent diffusion (arXiv:2112.10752) as Stable Diffusion wires it: a UNet and an autoencoder."""
