"""What Prometheus is told: requests of this process, and from the database what concerns all of them."""
