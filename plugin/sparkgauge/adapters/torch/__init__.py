"""PyTorch in a Spark barrier stage: ``launch`` runs on the driver, ``worker`` and ``training`` on the executors."""
