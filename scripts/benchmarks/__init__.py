"""What is measured by `scripts/benchmark.py`: one room a topic, each with `measure(options)` and its workers."""
