"""PostgreSQL as the place of a run's state; needs the extra `postgresql`."""
