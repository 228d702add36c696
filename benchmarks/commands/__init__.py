"""The subcommands of `osrm`: each module has add_arguments(parser, arguments) and run()."""
