"""What this server takes: methods, schemes and datasets."""
