"""What peers know of each other without agreeing on it: it may be stale, and no quorum rests on it. Read in this order:

version_vector      who knows what, small enough to send every second
records             what each peer says of itself, signed
record_book         everybody's newest record, and whose word is taken
messages            what peers say to each other of it
exchange            how everybody comes to hold everybody's: digest and delta
probing             who answers (SWIM)      (pings, probe_targets: its messages, and whose turn it is)
suspicion           alive, suspect or dead  (rumors: how that spreads)
failure_detector    phi accrual, for the links that matter
membership          what is held of every other peer, from all of these
gossip              all of it as one machine: what `neighbours.py` holds
"""
