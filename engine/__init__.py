"""Etude: a training engine for latent diffusion that trains, practises and evaluates."""

__version__ = "0.1.0"
