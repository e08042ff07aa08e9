"""`optimum-cli sieve tasks`: `command.TasksCommand`, the parent of the subcommands on task files."""
