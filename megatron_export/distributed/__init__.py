"""What ranks say to each other: collectives, the heartbeat, signals."""
