"""The virtual world: the same peers over a network, clocks and disks that are made up. Read in this order:

world, machine, network, disk, clock    one heap of events drives them all;  randomness: a stream for each purpose
training, quadratic, steady_work        what rounds do: real arithmetic, or nothing
faults, adversary, scenario             what goes wrong, and one run of it
invariants                              what must hold after every event;  mutants: bugs that they must see
sweep, coverage, report                 many seeds, what they hit, what they came to
"""
