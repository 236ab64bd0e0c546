"""One package per framework: how a round is launched on Spark and how its networks are built and trained."""
