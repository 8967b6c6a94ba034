"""When a round closes (`bsp`), and what the run and each member have come to (`state_tracker`)."""
