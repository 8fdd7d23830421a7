"""Noise schedules, training objectives, samplers and guidance, for any callable denoiser."""
