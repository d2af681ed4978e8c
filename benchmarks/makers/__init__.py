"""Scripts that the real frameworks run to make checkpoints of any size; without imports of ours, in any environment."""
