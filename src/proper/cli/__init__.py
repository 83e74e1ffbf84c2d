"""Command line interface `proper` (typer): one module per command. Only it and `proper.console` use a terminal."""
