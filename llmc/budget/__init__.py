"""A budget of bits: what each layer loses with fewer, and which schemes fit into so many."""
