"""Which job runs next, who holds it, how its attempts end, and what happens to jobs that nobody holds."""
