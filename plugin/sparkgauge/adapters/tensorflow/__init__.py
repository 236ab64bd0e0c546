"""TensorFlow through TensorFlowOnSpark: ``launch`` runs on the driver, ``training`` on the executors."""
