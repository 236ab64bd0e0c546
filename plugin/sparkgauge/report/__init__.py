"""What a session shows: progress while it trains, a table and phase lines after it, and a JSON file on request."""
