"""Running a model of which one layer is in memory: its own forward, suspended where the main loop looks."""
