"""
The parts, one file each: `GOAL`, a number that orders the table, and `rows(run)`.

How to write one: docs/reference/benchmarks.md.
"""
