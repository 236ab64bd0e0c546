"""Model definitions as numbers: what a framework's adapter needs to build and train each network."""
