"""What this server takes: methods and schemes."""
