"""The decoders that the engine knows: how each is built, from config.json and names of tensors. No torch."""
