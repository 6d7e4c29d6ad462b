"""How fast the API answers. Workload, machine and results: benchmarks/README.md."""
