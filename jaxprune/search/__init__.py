"""Search: candidates are inputs of one compiled program, so a search is a loop of forward passes."""
