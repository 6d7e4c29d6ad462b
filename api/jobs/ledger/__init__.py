"""What is known of jobs: their rows, their events, and how they are shown."""
