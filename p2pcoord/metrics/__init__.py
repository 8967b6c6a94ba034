"""The metrics of every round, as the records agree on them."""
