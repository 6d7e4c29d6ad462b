"""Mathematics: tensors in, tensors out. Nothing here knows of a plan, a model or a file."""
