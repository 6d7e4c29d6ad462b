"""Jobs: submitted over HTTP, claimed by workers, told through events."""
