"""Studies of published papers, each a command `osrm experiment NAME` with a report of its own."""
