"""The executable model: the real product code in simulated processes, with every kind of fault.

A seeded scheduler chooses interleavings, crashes, lost, doubled and late messages, storage
errors, pauses and clock jumps; after each run the invariants of the design's chapter 11 are
checked, and a run that breaks one is shrunk until nothing smaller breaks it.

    python -m tests.simulation --runs 100000 --seed 1
"""
