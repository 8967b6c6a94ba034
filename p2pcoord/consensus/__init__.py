"""How the peers of a run agree on one chain of records: Raft, with signatures. Read in this order:

quorum        committees, and when enough of them have spoken
statements    what is signed, and the proofs that a quorum's signatures make
record        what the chain consists of
ledger        the chain, and how far it is certified
log           its bytes on the disk, and how they are read back after a crash
messages      what voters say to each other
voter         what one voter keeps: term, vote, proof, log, role
election      how a term is won
replication   the coordinator's side: orders records, certifies them      (batches: what of a log goes into one message)
following     the follower's side: checks, appends, acknowledges
catch_up      certified records, for anybody who asks
committees    which committee a run should have
evidence      two statements that contradict each other
agreement     all of it as one machine: what `Peer` holds
"""
