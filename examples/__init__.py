"""Training with dissimilarity: README.md tells what each program does."""
