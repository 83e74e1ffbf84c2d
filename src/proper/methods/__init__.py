"""What is compared: how each method is trained, from which data, and how it answers."""
