"""What Flatwater's normalization costs in time, memory and accuracy, beside its limits and its alternatives.

``python -m benchmarks`` runs everything; README.md says what each part measures and how to read it.
"""
