"""The stages of a run, each resumable, each skipped when it was finished from the same inputs:

    base -> for each arm: rlhf/<arm> -> certify/<arm>, downstream/<arm>/<task>, attack/<arm>/<radius> ->
    report

with harness/<policy> after each policy that is kept, where the recipe asks for benchmarks. `graph` says what
each is made from, `folders` what of it is there, `walk` and `work` do the rest; the first two import no ML
library.
"""
