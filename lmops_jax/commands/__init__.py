"""What the subcommands of `lmops` do."""
