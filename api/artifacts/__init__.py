"""Published files of jobs."""
