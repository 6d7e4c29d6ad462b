"""HTTP: routes, what they share, and how errors are answered."""
