"""Entry points for launchers: one file per verb, equivalent to the subcommands of `drama`."""
