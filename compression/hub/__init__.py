"""Models and datasets by their names on the Hugging Face Hub. Nothing here imports torch or transformers."""
