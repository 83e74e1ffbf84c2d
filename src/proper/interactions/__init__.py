"""What is kept of people beside their adapters: interactions, fits that wait or run, and where all of it lies."""
