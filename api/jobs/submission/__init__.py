"""From a request to a planned job."""
