"""The subcommands of `osrm`, each with `add_arguments` and `run`, and what several share."""
