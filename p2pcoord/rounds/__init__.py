"""How one version of the model is made from the one before. Read in this order:

phases, plan, attempt               the eight phases; who does which part; what is summed, and over which tree
messages, frames                    what is said, and what a member writes to its log
setting, rounds                     what both sides stand on; both sides together, `Peer`'s work
participant                         a member's side, made of
    training, summing, stepping         its work on the plan, on the sum, on the new state
    judging                             what it checks before it acknowledges a round's record
    holdings, attempt_book, transfers   what lies on its disk, what it was shown, what it fetches
coordinator                         the coordinator's side: the phases, and in each of them
    takeover, collection                what a predecessor began; the plan and the contributions to it
    aggregating, conclusion             attempts and losses; states, validation and the record
    reliability                         whom it counts on, from round to round
participation, admissions           who is a member by the ledger; who wants in or out
"""
