"""Jobs: submitted over HTTP, claimed by workers, followed by their events."""
