"""Jobs through the real service while its processes are killed at random: `make chaos`."""
