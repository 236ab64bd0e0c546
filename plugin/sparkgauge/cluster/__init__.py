"""The Spark cluster under test: Java, configuration, processes, and what guarantees that none of them is left over."""
