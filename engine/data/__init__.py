"""Pictures to batches: shards, their order, augmentation, two decoders, latents, growing pools."""
