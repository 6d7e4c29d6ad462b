"""Workers and queues, as far as a project may see them."""
