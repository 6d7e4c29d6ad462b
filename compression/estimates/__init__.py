"""What a run takes, before it starts: memory, room on disk and time, item by item. No torch."""
