"""What is trained: a block's objective, the whole network's, and what is chosen between."""
