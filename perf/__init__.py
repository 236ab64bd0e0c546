"""The suite: one file per question that a release has to answer."""
