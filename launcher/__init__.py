"""Programs for launchers: one verb each, the same as the subcommands of `drama`."""
