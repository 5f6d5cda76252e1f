"""What `benchmarks/cost.py` measures: models of three sizes, one step of every method, masks, lines, start-up."""
