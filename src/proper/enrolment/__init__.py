"""Users who arrive or grow after training: one user fitted alone, from the queue or from the command line."""
