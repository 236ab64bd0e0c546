"""``--gauge-against REF``: the working tree and a commit of it, trained in turn and compared in pairs of rounds.

- :mod:`~sparkgauge.against.worktree`: the commit, checked out into a temporary folder.
- :mod:`~sparkgauge.against.child`: the pytest process that runs there, its import path, its log.
- :mod:`~sparkgauge.against.opponent`: this side's end of the conversation with it.
- :mod:`~sparkgauge.against.server`: the other end, which trains when asked and judges nothing.
- :mod:`~sparkgauge.against.duel`: the pairs of one test, their order and the verdict on them.
- :mod:`~sparkgauge.against.explain`: which phase and which executor a slowdown went into.
- :mod:`~sparkgauge.against.hooks`: what pytest calls.
"""
