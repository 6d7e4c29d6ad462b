"""`make bench`."""

from benchmarks.gptq_vs_peer import main

main()
