"""Speed and memory, as ratios within one process; never part of the tests."""
