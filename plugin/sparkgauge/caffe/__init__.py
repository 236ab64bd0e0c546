"""Reads and writes what Caffe trains from: prototxt, weights, solver states, mean images, LMDB. Needs protobuf only."""
