"""Research methods on the same training and evaluation harness. None is here yet."""
