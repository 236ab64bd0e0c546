"""Caffe nets on Spark: the engines and what runs them on executors."""
