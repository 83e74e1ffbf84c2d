"""The command `proper`: one short file per command. Only this package and the console know a terminal."""
